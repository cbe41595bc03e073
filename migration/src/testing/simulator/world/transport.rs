//! The links of the simulated world, and what goes wrong on them.

use super::{FaultKind, World, index};
use crate::page::PAGE_BYTES;
use std::collections::VecDeque;
use std::io;
use std::time::Duration;

/// A connection: bytes on their way, and whether more will come.
#[derive(Debug, Default)]
pub(in crate::testing::simulator) struct Connection {
    pub to_destination: VecDeque<u8>,
    pub to_source: VecDeque<u8>,
    pub broken: bool,
    pub stalled: bool,
}

/// Which end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::testing::simulator) enum Side {
    Source,
    Destination,
}

/// What a message takes on a link that trickles.
const SLOW: Duration = Duration::from_secs(2);

/// What pages weigh on the link.
pub(in crate::testing::simulator) const fn weight_of(head: usize, pages: u64) -> u64 {
    head as u64 + pages * PAGE_BYTES
}

impl World {
    /// Whether the process at this end has died.
    pub fn is_dead(&self, side: Side) -> bool {
        match side {
            Side::Source => self.source_dead,
            Side::Destination => self.destination_dead,
        }
    }

    /// How long the link is busy with so many bytes.
    pub fn takes(&self, weight: u64) -> Duration {
        Duration::from_secs_f64(weight as f64 / self.bandwidth)
            + Duration::from_micros(20)
            + self.slow
    }

    /// Hands over what the link took of a message until its sender's deadline.
    pub fn send_in_part(&mut self, side: Side, connection: usize, bytes: &[u8]) {
        if !self.is_dead(side) && !self.connections[connection].broken {
            let part = index(self.rng.below(bytes.len() as u64));
            self.deliver(side, connection, &bytes[..part]);
        }
    }

    /// Sends bytes; `weight` is how many bytes they stand for.
    pub fn send(
        &mut self,
        side: Side,
        connection: usize,
        bytes: &[u8],
        weight: u64,
        guarded: usize,
    ) -> io::Result<()> {
        self.pass(self.takes(weight));
        if self.is_dead(side) || self.connections[connection].broken {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let at = self.messages;
        self.messages += 1;
        let fault = self
            .faults
            .iter()
            .find(|fault| fault.at == at)
            .map(|fault| fault.kind);
        match fault {
            Some(FaultKind::CutBefore) => self.break_all(),
            Some(FaultKind::LostSilently) => {
                self.break_all();
                return Ok(());
            }
            Some(FaultKind::CutWithin) => {
                let keep = index(self.rng.below(bytes.len() as u64));
                self.deliver(side, connection, &bytes[..keep]);
                self.break_all();
            }
            Some(FaultKind::SourceDies) => {
                self.source_dead = true;
                self.source_runs = false;
                self.break_all();
            }
            Some(FaultKind::DestinationDies) => {
                self.destination_dead = true;
                self.destination_runs = false;
                self.break_all();
            }
            Some(FaultKind::Flip(bit)) => {
                let range = if self.verified { bytes.len() } else { guarded };
                let bit = bit as usize % (range * 8).max(1);
                let mut bytes = bytes.to_vec();
                if let Some(byte) = bytes.get_mut(bit / 8) {
                    *byte ^= 1 << (bit % 8);
                }
                self.deliver(side, connection, &bytes);
                return Ok(());
            }
            Some(FaultKind::Slow) => self.slow = SLOW,
            Some(FaultKind::Stall) => {
                for connection in &mut self.connections {
                    connection.stalled = true;
                }
            }
            Some(FaultKind::Cancel) => self.cancel(),
            Some(FaultKind::CutAfter) => {
                self.deliver(side, connection, bytes);
                self.break_all();
                return Ok(());
            }
            None => {}
        }
        if self.connections[connection].broken {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        self.deliver(side, connection, bytes);
        Ok(())
    }

    fn deliver(&mut self, from: Side, connection: usize, bytes: &[u8]) {
        let connection = &mut self.connections[connection];
        if connection.stalled {
            return;
        }
        match from {
            Side::Source => connection.to_destination.extend(bytes),
            Side::Destination => connection.to_source.extend(bytes),
        }
    }

    /// Breaks every connection; what was on its way in both directions still arrives.
    fn break_all(&mut self) {
        for connection in &mut self.connections {
            connection.broken = true;
        }
    }
}
