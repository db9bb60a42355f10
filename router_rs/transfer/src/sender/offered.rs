//! What a sender has offered so far: blocks to be hashed, told of, and the last word.

use super::{Action, Announced, Tail};
use crate::{error::Refused, id::Reason};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Block {
    pub(super) slot: u32,
    pub(super) version: u64,
    pub(super) checksum: Option<u64>,
}

/// What was offered so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Offered {
    /// Index of `blocks[0]`; known with the first `Ready`.
    pub(super) first: Option<u32>,
    pub(super) blocks: Vec<Block>,
    /// Next block to be hashed, and to be announced; absolute.
    pub(super) hash_next: u32,
    pub(super) announce_next: u32,
    pub(super) commit: Option<Tail>,
    /// The last of `blocks` is not full.
    pub(super) has_partial: bool,
}

impl Offered {
    pub(super) fn at(&mut self, block: u32) -> Option<&mut Block> {
        let index = block.checked_sub(self.first?)?;
        self.blocks.get_mut(index as usize)
    }

    pub(super) fn end(&self) -> u32 {
        self.first.unwrap_or(0) + self.blocks.len() as u32
    }

    pub(super) fn add(&mut self, first: u32, blocks: &[(u32, u64)]) -> Result<(), Refused> {
        if self.first.is_some_and(|_| first != self.end()) {
            let message = format!("block {first} is announced after {}", self.end());
            return Err(Refused::new(Reason::Failed, message));
        }
        if u32::try_from(blocks.len())
            .ok()
            .and_then(|n| first.checked_add(n))
            .is_none()
        {
            return Err(Refused::new(Reason::Failed, "too many blocks"));
        }
        self.first.get_or_insert(first);
        self.blocks
            .extend(blocks.iter().map(|(slot, version)| Block {
                slot: *slot,
                version: *version,
                checksum: None,
            }));
        Ok(())
    }

    /// Full blocks end here.
    fn full_end(&self) -> u32 {
        self.end() - u32::from(self.has_partial)
    }

    /// Hashes and announces what can be; whether all is said.
    pub(super) fn advance(&mut self, actions: &mut Vec<Action>) -> bool {
        let end = self.end();
        self.hash_next = self.hash_next.max(self.first.unwrap_or(0));
        while self.hash_next < end {
            let block = self.hash_next;
            if let Some(slot) = self.at(block).map(|b| b.slot) {
                actions.push(Action::Hash { block, slot });
            }
            self.hash_next += 1;
        }
        let first = self.announce_next;
        let mut blocks = Vec::new();
        while self.announce_next < self.full_end() {
            let at = self.announce_next;
            let Some(announced) = self.at(at).and_then(|b| b.announced()) else {
                break;
            };
            blocks.push(announced);
            self.announce_next += 1;
        }
        if !blocks.is_empty() {
            actions.push(Action::Announce { first, blocks });
        }
        let Some(tail) = self.commit.clone() else {
            return false;
        };
        if self.announce_next < self.full_end() {
            return false;
        }
        let mut partial = None;
        if self.has_partial {
            let at = self.full_end();
            let Some(announced) = self.at(at).and_then(|b| b.announced()) else {
                return false;
            };
            partial = Some((at, announced));
        }
        actions.push(Action::SendCommit { tail, partial });
        true
    }
}

impl Block {
    fn announced(&self) -> Option<Announced> {
        Some(Announced {
            slot: self.slot,
            version: self.version,
            checksum: self.checksum?,
        })
    }
}
