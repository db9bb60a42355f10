//! The look-up: for every worker at once, the longest prefix without a hole.

use crate::bits::members;
use crate::chain::UNIT_TOKENS;
use crate::core::{Core, SizeClass};
use crate::holders::{HolderId, NOBODY};
use crate::run::common_prefix;
use crate::worker::Matches;

impl Core {
    pub(crate) fn lookup(&self, chain: &[u64], found: &mut Matches) {
        found.reset(self.slots());
        let tiered = self.sets.tiered();
        if tiered {
            found.reset_tiers();
        }
        for class in &self.classes {
            self.walk(class, chain, tiered, found);
        }
    }

    /// Follows the blocks of one size as long as anybody of that size holds
    /// them all.
    fn walk(&self, class: &SizeClass, chain: &[u64], tiered: bool, found: &mut Matches) {
        let (blocks, mut held) = (chain.len() / class.units, 0);
        let mut last = NOBODY;
        while held < blocks {
            let Some(place) = self.find(chain[(held + 1) * class.units - 1]) else {
                break;
            };
            if held == 0 {
                found.alive.clear();
                found.alive.extend_from_slice(class.workers.as_words());
            }
            let run = &self.runs[place.run];
            let mut slot = place.slot;
            for (holders, end) in run.spans_from(place.slot) {
                let rest = &chain[held * class.units..blocks * class.units];
                let (same, slots) = compare(rest, class.units, &run.values()[slot..end]);
                // A value that nobody holds here may be held elsewhere.
                if holders == NOBODY || same == 0 {
                    break;
                }
                if holders != last {
                    last = holders;
                    if !self.narrow(class, holders, held, found) {
                        run.touch(place.slot..slot.max(place.slot + 1), self.now);
                        return;
                    }
                }
                if tiered {
                    self.count_tiers(class, holders, same, found);
                }
                held += same;
                slot += slots;
                if slot < end || held == blocks {
                    break;
                }
            }
            run.touch(place.slot..slot, self.now);
        }
        if held > 0 {
            self.narrow(class, NOBODY, held, found);
        }
    }

    /// Workers of a class that do not hold the next block end with what they
    /// had, `held` blocks. Whether any are left.
    fn narrow(
        &self,
        class: &SizeClass,
        holders: HolderId,
        held: usize,
        found: &mut Matches,
    ) -> bool {
        let holders = self.sets.any(holders);
        let tokens = u32::try_from(held * class.units * UNIT_TOKENS).unwrap_or(u32::MAX);
        let mut left = 0;
        for i in 0..class.workers.words() {
            let (alive, holding) = (found.alive[i], holders.word(i));
            let leaving = alive & !holding;
            left |= alive & holding;
            if leaving != 0 {
                found.alive[i] = alive & holding;
                if held > 0 {
                    found.any = true;
                    for worker in members(i, leaving) {
                        found.tokens[worker] = tokens;
                    }
                }
            }
        }
        left != 0
    }

    /// Adds blocks that lie below the device, for the workers that still hold
    /// everything.
    fn count_tiers(
        &self,
        class: &SizeClass,
        holders: HolderId,
        blocks: usize,
        found: &mut Matches,
    ) {
        let tokens = u32::try_from(blocks * class.units * UNIT_TOKENS).unwrap_or(u32::MAX);
        let [device, host, disk] = &self.sets.get(holders).tiers;
        for i in 0..host.words().max(disk.words()).min(class.workers.words()) {
            let below = (host.word(i) | disk.word(i)) & !device.word(i);
            for worker in members(i, below & found.alive[i]) {
                let tier = if host.has(worker) {
                    &mut found.host
                } else {
                    &mut found.disk
                };
                tier[worker] = tier[worker].saturating_add(tokens);
            }
        }
    }
}

/// Blocks at the start of `rest` (of `units` chain values each, named by their
/// last) that come in this order in `values`, and the slots that these take.
/// Between them may lie what workers with smaller blocks stored.
fn compare(rest: &[u64], units: usize, values: &[u64]) -> (usize, usize) {
    if units == 1 {
        let same = common_prefix(rest, values);
        return (same, same);
    }
    let (mut blocks, mut slot) = (0, 0);
    for name in rest.iter().skip(units - 1).step_by(units) {
        let near = &values[slot..values.len().min(slot + units)];
        let Some(at) = near.iter().position(|value| value == name) else {
            break;
        };
        blocks += 1;
        slot += at + 1;
    }
    (blocks, slot)
}
