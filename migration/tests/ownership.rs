//! The ownership protocol as a model, checked in every state that it can reach.
//!
//! Two sides, a network that loses, delays and repeats messages, crashes of each side, recover,
//! take-over, and a disk that both sides share. What holds in every state and over every step:
//!
//! 1. at most one side runs the guest;
//! 2. no side runs it from memory that is older than its disk;
//! 3. only a crash, or an operator who ends a process, can lose it: while a side that has it lives,
//!    nothing else takes it away, and it can come to run again.
//!
//! The model can fail: each rule is broken once, and the break must be found.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};

/// The source's phases from the pause on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    Runs,
    Stopped,
    Committed,
    InDoubt,
    /// The guest runs at the destination; what was here is gone.
    Discarded,
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Destination {
    Filling,
    Ready,
    InDoubt,
    Runs,
    Discarded,
    Dead,
}

/// Messages that were sent. Each may arrive later, again, or never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Sent {
    state: bool,
    commit: bool,
    abort: bool,
    ready: bool,
    running: bool,
    /// The destination's ABORT, before it was ready.
    refused: bool,
    not_started: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct World {
    source: Source,
    destination: Destination,
    sent: Sent,
    /// The guest has run, and may have written its disk, since its state was saved: at the source,
    /// at the destination.
    source_wrote: bool,
    destination_wrote: bool,
    /// The destination was told to end before it had a guest: that is a crash which can still say
    /// so.
    stopping: bool,
}

/// What is kept to; each can be broken.
#[derive(Clone, Copy, Debug)]
struct Rules {
    /// The source does not resume by itself after its commit.
    commit_is_written_down: bool,
    /// The destination runs nothing before the commit.
    runs_on_commit_only: bool,
    /// A destination that refuses the commit has discarded the guest.
    refusal_is_final: bool,
    /// The source keeps the guest until it was told that it runs.
    keeps_until_confirmed: bool,
    /// A take-over compares the disks with their marks.
    take_over_checks_disks: bool,
    /// A destination that was ready keeps the guest until the source's word.
    keeps_when_silent: bool,
}

const KEPT: Rules = Rules {
    commit_is_written_down: true,
    runs_on_commit_only: true,
    refusal_is_final: true,
    keeps_until_confirmed: true,
    take_over_checks_disks: true,
    keeps_when_silent: true,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Step,
    Crash,
}

impl World {
    const START: Self = Self {
        source: Source::Runs,
        destination: Destination::Filling,
        sent: Sent {
            state: false,
            commit: false,
            abort: false,
            ready: false,
            running: false,
            refused: false,
            not_started: false,
        },
        source_wrote: false,
        destination_wrote: false,
        stopping: false,
    };

    fn source_has(&self) -> bool {
        let has = !matches!(self.source, Source::Discarded | Source::Dead);
        has && !self.destination_wrote
    }

    fn destination_has(&self) -> bool {
        match self.destination {
            Destination::Runs => true,
            Destination::Ready | Destination::InDoubt => !self.source_wrote && !self.stopping,
            _ => false,
        }
    }

    fn runs(&self) -> bool {
        self.source == Source::Runs || self.destination == Destination::Runs
    }

    /// What is wrong in this state.
    fn wrong(&self) -> Option<&'static str> {
        if self.source == Source::Runs && self.destination == Destination::Runs {
            return Some("both sides run the guest");
        }
        if self.source == Source::Runs && self.destination_wrote {
            return Some("the source runs old memory over a newer disk");
        }
        if self.destination == Destination::Runs && self.source_wrote {
            return Some("the destination runs old memory over a newer disk");
        }
        None
    }

    /// All that can happen next.
    fn next(&self, rules: Rules) -> Vec<(Kind, &'static str, Self)> {
        let mut next = Vec::new();
        self.source_steps(rules, &mut next);
        self.destination_steps(rules, &mut next);
        self.operator_steps(rules, &mut next);
        let mut crash = |what, world| next.push((Kind::Crash, what, world));
        if self.source != Source::Dead {
            let source = Source::Dead;
            crash("the source dies", Self { source, ..*self });
        }
        if self.destination != Destination::Dead {
            let destination = Destination::Dead;
            crash(
                "the destination dies",
                Self {
                    destination,
                    ..*self
                },
            );
            if self.destination != Destination::Runs {
                let stopping = true;
                crash("the destination is stopped", Self { stopping, ..*self });
            }
        }
        next
    }

    fn source_steps(&self, rules: Rules, next: &mut Vec<(Kind, &'static str, Self)>) {
        let mut step = |what, world| next.push((Kind::Step, what, world));
        let at = |source| Self { source, ..*self };
        let resumed = || Self {
            // The guest goes on: what was saved is old from now on.
            source_wrote: self.sent.state,
            ..at(Source::Runs)
        };
        match self.source {
            Source::Runs if !self.sent.state => {
                let mut world = at(Source::Stopped);
                world.sent.state = true;
                step("the source sends the state", world);
            }
            Source::Stopped => {
                let mut world = resumed();
                world.sent.abort = true;
                step("the source aborts", world);
                if self.sent.refused {
                    step("the source reads ABORT", resumed());
                }
                if self.sent.ready {
                    let mut world = at(if rules.keeps_until_confirmed {
                        Source::Committed
                    } else {
                        Source::Discarded
                    });
                    world.sent.commit = true;
                    step("the source commits", world);
                }
            }
            Source::Committed | Source::InDoubt => {
                if rules.commit_is_written_down {
                    step("no answer comes", at(Source::InDoubt));
                } else {
                    step("no answer comes, and the source resumes", resumed());
                }
                if self.sent.running {
                    step("the source reads RUNNING", at(Source::Discarded));
                }
                if self.sent.not_started {
                    step("the source reads NOT-STARTED", resumed());
                }
            }
            Source::Runs | Source::Discarded | Source::Dead => {}
        }
    }

    fn destination_steps(&self, rules: Rules, next: &mut Vec<(Kind, &'static str, Self)>) {
        let mut step = |what, world| next.push((Kind::Step, what, world));
        let at = |destination| Self {
            destination,
            ..*self
        };
        let started = || {
            let mut world = at(Destination::Runs);
            (world.destination_wrote, world.sent.running) = (true, true);
            world
        };
        match self.destination {
            Destination::Filling => {
                let mut world = at(Destination::Discarded);
                world.sent.refused = true;
                step("the destination refuses the guest", world);
                if self.sent.state {
                    let mut world = at(Destination::Ready);
                    world.sent.ready = true;
                    step("the destination is ready", world);
                }
            }
            Destination::Ready | Destination::InDoubt => {
                if rules.keeps_when_silent {
                    step("no commit comes", at(Destination::InDoubt));
                } else {
                    step(
                        "no commit comes, and it is discarded",
                        at(Destination::Discarded),
                    );
                }
                if self.sent.abort {
                    step("the destination reads ABORT", at(Destination::Discarded));
                }
                let starts = !self.stopping || !rules.refusal_is_final;
                if starts && (self.sent.commit || !rules.runs_on_commit_only) {
                    step("the destination starts the guest", started());
                }
                if self.sent.commit && self.stopping {
                    let mut world = at(if rules.refusal_is_final {
                        Destination::Discarded
                    } else {
                        Destination::InDoubt
                    });
                    world.sent.not_started = true;
                    step("a stopped destination refuses the commit", world);
                }
            }
            // A commit that comes again is answered again: that changes nothing here.
            Destination::Runs | Destination::Discarded | Destination::Dead => {}
        }
    }

    /// The operator's word is true: the other side does not run the guest, and never will.
    fn operator_steps(&self, rules: Rules, next: &mut Vec<(Kind, &'static str, Self)>) {
        let mut step = |what, world| next.push((Kind::Step, what, world));
        let fits = |newer: bool| !newer || !rules.take_over_checks_disks;
        let no_destination = matches!(self.destination, Destination::Discarded | Destination::Dead);
        if self.source == Source::InDoubt && no_destination && fits(self.destination_wrote) {
            let world = Self {
                source: Source::Runs,
                source_wrote: true,
                ..*self
            };
            step("an operator takes over at the source", world);
        }
        if matches!(self.destination, Destination::Ready | Destination::InDoubt)
            && self.source == Source::Dead
            && !self.stopping
            && fits(self.source_wrote)
        {
            let world = Self {
                destination: Destination::Runs,
                destination_wrote: true,
                ..*self
            };
            step("an operator takes over at the destination", world);
        }
    }
}

/// How a state came about.
type Reached = HashMap<World, Option<(World, &'static str)>>;

fn story(reached: &Reached, end: World, what: &str) -> String {
    let mut steps = vec![what.to_owned()];
    let mut at = end;
    while let Some((before, step)) = reached[&at] {
        steps.push(step.to_owned());
        at = before;
    }
    steps.reverse();
    steps.join("; ")
}

/// Looks at every state that can be reached; the number of them, or the shortest way to something
/// wrong.
fn check(rules: Rules) -> Result<usize, String> {
    let mut reached = Reached::from([(World::START, None)]);
    let mut queue = VecDeque::from([World::START]);
    let mut back: HashMap<World, Vec<World>> = HashMap::new();
    while let Some(world) = queue.pop_front() {
        let had = world.source_has() || world.destination_has();
        for (kind, what, then) in world.next(rules) {
            if kind == Kind::Step {
                back.entry(then).or_default().push(world);
                if had && !(then.source_has() || then.destination_has()) {
                    let lost = format!("{what}: the guest is lost without a crash");
                    return Err(story(&reached, world, &lost));
                }
            }
            if let Entry::Vacant(place) = reached.entry(then) {
                place.insert(Some((world, what)));
                queue.push_back(then);
            }
        }
        if let Some(wrong) = world.wrong() {
            return Err(story(&reached, world, wrong));
        }
    }
    // Backwards from where it runs, without crashes.
    let mut live: Vec<World> = reached.keys().copied().filter(World::runs).collect();
    let mut can_run: std::collections::HashSet<World> = live.iter().copied().collect();
    while let Some(world) = live.pop() {
        for before in back.get(&world).into_iter().flatten() {
            if can_run.insert(*before) {
                live.push(*before);
            }
        }
    }
    for world in reached.keys() {
        if (world.source_has() || world.destination_has()) && !can_run.contains(world) {
            return Err(story(&reached, *world, "the guest can never run again"));
        }
    }
    Ok(reached.len())
}

#[test]
fn at_most_one_owner_and_no_guest_lost() {
    let states = check(KEPT).unwrap_or_else(|story| panic!("{story}"));
    println!("{states} states");
    assert!(states > 100, "{states}");
}

/// Each rule is needed: without it something goes wrong, and is found.
#[test]
fn a_broken_rule_is_found() {
    let broken = [
        (
            Rules {
                commit_is_written_down: false,
                ..KEPT
            },
            "both sides",
        ),
        (
            Rules {
                runs_on_commit_only: false,
                ..KEPT
            },
            "both sides",
        ),
        (
            Rules {
                refusal_is_final: false,
                ..KEPT
            },
            "both sides",
        ),
        (
            Rules {
                keeps_until_confirmed: false,
                ..KEPT
            },
            "lost without a crash",
        ),
        (
            Rules {
                take_over_checks_disks: false,
                ..KEPT
            },
            "old memory over a newer disk",
        ),
    ];
    for (rules, what) in broken {
        let story = check(rules).expect_err(what);
        println!("{story}");
        let old = "old memory over a newer disk";
        assert!(story.contains(what) || story.contains(old), "{story}");
    }
    // With the source dead, what the destination throws away was the only copy.
    let rules = Rules {
        keeps_when_silent: false,
        ..KEPT
    };
    assert!(check(rules).unwrap_err().contains("lost without a crash"));
}
