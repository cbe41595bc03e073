//! The source's last word, late and once more: it must change nothing.

use super::link::{Peer, SimLink};
use super::lock;
use super::world::World;
use crate::wire::{Channel, FrameType, Header, Role, SessionId, WireError};
use std::sync::{Arc, Mutex};

/// Repeats COMMIT, where the guest was committed, or ABORT, where the source runs it, on a new
/// connection.
pub(super) fn last_word(
    world: &Arc<Mutex<World>>,
    peer: &Arc<Mutex<Peer>>,
    session: SessionId,
    violations: &mut Vec<String>,
) {
    let (committed, runs, ran) = {
        let world = lock(world);
        if world.source_dead || world.destination_dead {
            return;
        }
        (world.committed, world.source_runs, world.destination_runs)
    };
    if !committed && !runs {
        return;
    }
    let answer = say(world, peer, session, committed);
    Peer::drive_all(peer);
    let world = lock(world);
    if committed && ran {
        // A repeated question gets the answer again.
        if !matches!(answer, Ok(Some(FrameType::Running))) {
            violations.push(format!("a repeated COMMIT was answered by {answer:?}"));
        }
        if !world.destination_runs {
            violations.push("a repeated COMMIT stopped the guest".into());
        }
    }
    if !committed && (world.destination_runs || world.destination_has) {
        violations.push("after a repeated ABORT the destination has the guest".into());
    }
    if world.starts > 1 {
        violations.push(format!("the destination started {} times", world.starts));
    }
}

fn say(
    world: &Arc<Mutex<World>>,
    peer: &Arc<Mutex<Peer>>,
    session: SessionId,
    committed: bool,
) -> Result<Option<FrameType>, WireError> {
    let link = SimLink::connect(world, peer).map_err(WireError::Io)?;
    let mut channel = Channel::new(link);
    channel.open(Role::Recover, 0, session)?;
    if !committed {
        channel.send_abort("the guest stays where it is");
        return Ok(None);
    }
    channel.send(Header::bare(FrameType::Commit, 0), &[])?;
    channel.recv_header().map(|header| Some(header.kind))
}
