//! Workers that fail and come back.

use super::Simulation;
use crate::events::Event;
use kvmesh_kv_index::{CacheChange, WorkerSlot};

impl Simulation<'_> {
    /// A worker loses everything. Nobody knows yet.
    pub(super) fn fails(&mut self, number: usize) {
        let failure = self.settings.failures[number];
        let worker = &mut self.workers[failure.worker];
        worker.alive = false;
        worker.life += 1;
        worker.step = None;
        worker.on_the_way.clear();
        let noticed = Event::Noticed {
            number: number as u32,
        };
        self.later(failure.noticed_after_ms, noticed);
        if let Some(after_ms) = failure.back_after_ms {
            let after_ms = after_ms.max(failure.noticed_after_ms);
            let back = Event::Back {
                number: number as u32,
            };
            self.later(after_ms, back);
        }
    }

    /// Routers notice: what was there is placed again, with the tokens that
    /// its clients have; attempts that had one foot there too.
    pub(super) fn noticed(&mut self, number: usize) {
        let gone = self.settings.failures[number].worker;
        let lost = self.workers[gone].engine.lose_all();
        let slot = WorkerSlot(gone as u32);
        // Slots are as many as workers, from the start to the end.
        let _ = self.index.apply(slot, &[CacheChange::Cleared]);
        for router in &mut self.routers {
            router.stands(gone, false);
        }
        let mut again: Vec<u32> = Vec::new();
        for (request, left) in lost {
            let flight = &mut self.flights[request as usize];
            // Tokens up to the failure are with the client.
            let made = self.trace.requests[request as usize].output - left;
            if made > flight.made {
                flight.made = made;
                flight.last_ms = self.settings.failures[number].at_ms;
            }
            again.push(request);
        }
        // Those that were on their way there.
        for request in self.recorder.open() {
            let flight = &self.flights[request as usize];
            let placed = flight.attempt > 0 && self.routers[flight.router as usize].has(request);
            if placed && (flight.prefill as usize == gone || flight.decode as usize == gone) {
                again.push(request);
            }
        }
        again.sort_unstable();
        again.dedup();
        for request in again {
            let flight = self.flights[request as usize];
            for other in [flight.prefill, flight.decode] {
                if other as usize != gone {
                    self.workers[other as usize]
                        .engine
                        .cancel(request, self.trace);
                }
            }
            self.recorder.returned();
            self.routers[flight.router as usize].released(request);
            self.place_again(request);
        }
    }

    pub(super) fn back(&mut self, number: usize) {
        let worker = self.settings.failures[number].worker;
        self.workers[worker].alive = true;
        self.workers[worker].commands.fill(0);
        for router in &mut self.routers {
            router.stands(worker, true);
        }
        for router in 0..self.routers.len() {
            self.serve_queue(router);
        }
    }
}
