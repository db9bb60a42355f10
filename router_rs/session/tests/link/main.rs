//! A router's session with one worker under every order of events: the very link that serves,
//! checked whole by Stateright.
//!
//! The worker beats, falls silent, is stuck under a beating port, or dies and comes back as
//! another incarnation. What it answers shows that it works, blames it, or says nothing of it.
//! Connections break, are refused, and never open; hellos do not fit; waits end at any time, in
//! any order. What goes wrong costs a budget, all else is free.
#![allow(missing_docs)]

mod sim;

use kvmesh_session::link::State;
use stateright::{Checker, Model, Property};

use sim::{Came, Move, Sim};

/// What may go wrong how often, and how long a broken session is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct World {
    /// The worker stops or dies, or its session breaks.
    faults: u8,
    /// Answers that fail, or that say nothing of the worker.
    failures: u8,
    /// Connections that nobody takes, or that stay without a hello.
    vain: u8,
    grace_ms: u64,
}

impl Model for World {
    type State = Sim;
    type Action = Move;

    fn init_states(&self) -> Vec<Sim> {
        vec![Sim::new(*self)]
    }

    fn actions(&self, sim: &Sim, actions: &mut Vec<Move>) {
        actions.extend(sim.moves());
    }

    fn next_state(&self, sim: &Sim, step: Move) -> Option<Sim> {
        let mut next = sim.clone();
        next.make(step);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing goes wrong", |_, sim: &Sim| sim.wrong.is_none()),
            Property::always("every wait ends", |_, sim: &Sim| sim.recovers()),
            Property::sometimes("a worker on probation is let in again", |_, sim: &Sim| {
                sim.came == Came::LetInAgain
            }),
            Property::sometimes("a worker is ejected", |_, sim: &Sim| {
                *sim.link.state() == State::Ejected
            }),
            Property::sometimes(
                "a session goes on after a blip",
                |world: &World, sim: &Sim| world.grace_ms == 0 || sim.came == Came::Reattached,
            ),
            Property::sometimes(
                "another incarnation comes back",
                |world: &World, sim: &Sim| world.grace_ms == 0 || sim.came == Came::Died,
            ),
        ]
    }
}

fn check(world: World) {
    let checker = world.checker().threads(2).spawn_bfs().join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!("{states} states, depth {depth}: {world:?}");
    checker.assert_properties();
}

const WORLD: World = World {
    faults: 3,
    failures: 4,
    vain: 2,
    grace_ms: 250,
};

#[test]
fn a_worker_is_placed_on_again_whatever_came_before() {
    check(WORLD);
}

#[test]
fn so_it_is_where_no_return_is_waited_for() {
    check(World {
        grace_ms: 0,
        ..WORLD
    });
}
