//! Connections that do anything at any time, against streams of bytes that are simply remembered:
//! what arrives is what was sent, in order, and no side gets more than it has room for.

use proptest::prelude::*;

use super::*;

/// Connections of a run; the guest's port is the number.
const MOST: u32 = 4;
/// Of a guest's socket.
const GUEST_ROOM: u32 = 3000;

#[derive(Debug, Clone, Copy)]
enum Step {
    Connect,
    GuestSends(u16),
    ProgramSends(u16),
    ProgramReads(u16),
    GuestReads(u16),
    ProgramEnds,
    GuestEnds,
    /// The guest takes so many packets.
    Take(u8),
}

fn step() -> impl Strategy<Value = (u32, Step)> {
    let step = prop_oneof![
        2 => Just(Step::Connect),
        4 => (1..20_000u16).prop_map(Step::GuestSends),
        4 => (1..20_000u16).prop_map(Step::ProgramSends),
        4 => (1..40_000u16).prop_map(Step::ProgramReads),
        6 => (1..5_000u16).prop_map(Step::GuestReads),
        1 => Just(Step::ProgramEnds),
        1 => Just(Step::GuestEnds),
        8 => (1..20u8).prop_map(Step::Take),
    ];
    (0..MOST, step)
}

/// A stream of one connection in one direction.
#[derive(Default)]
struct Stream {
    sent: u32,
    arrived: u32,
    ended: bool,
}

/// The byte at a place of a stream.
fn byte(guest: u32, at: u32) -> u8 {
    (guest * 31 + at * 7 + at / 251).to_le_bytes()[0]
}

fn bytes(guest: u32, from: u32, len: u32) -> Vec<u8> {
    (from..from + len).map(|at| byte(guest, at)).collect()
}

fn number(n: usize) -> u32 {
    u32::try_from(n).unwrap()
}

struct Side {
    program: UnixStream,
    outward: Stream,
    inward: Stream,
    /// What the guest's program has read, and what the host has told.
    read: u32,
    host_forwarded: u32,
    answered: bool,
    told_end: bool,
}

impl Side {
    fn packet(&self, op: Op, guest: u32) -> Header {
        Header {
            buf_alloc: GUEST_ROOM,
            fwd_cnt: self.read,
            ..packet(op, guest, 5)
        }
    }
}

struct Run {
    bench: Bench,
    sides: [Option<Side>; MOST as usize],
}

impl Run {
    fn act(&mut self, guest: u32, step: Step) {
        let slot = guest as usize;
        if let (Step::Connect, None) = (step, &self.sides[slot]) {
            let request = Header {
                buf_alloc: GUEST_ROOM,
                ..packet(Op::Request, guest, 5)
            };
            self.bench.muxer.receive(&request, &[]);
            let (_, program) = lock(&self.bench.accepted).pop_front().unwrap();
            program.set_nonblocking(true).unwrap();
            self.sides[slot] = Some(Side {
                program,
                outward: Stream::default(),
                inward: Stream::default(),
                read: 0,
                host_forwarded: 0,
                answered: false,
                told_end: false,
            });
        }
        if let Step::Take(n) = step {
            (0..n).for_each(|_| self.take());
            return;
        }
        let Some(side) = &mut self.sides[slot] else {
            return;
        };
        match step {
            Step::GuestSends(len) if side.answered && !side.outward.ended => {
                let credit = ROOM - (side.outward.sent - side.host_forwarded);
                let len = credit.min(len.into());
                let data = bytes(guest, side.outward.sent, len);
                side.outward.sent += len;
                let header = Header {
                    len,
                    ..side.packet(Op::Data, guest)
                };
                self.bench.muxer.receive(&header, &data);
            }
            Step::ProgramSends(len) if !side.inward.ended => {
                let data = bytes(guest, side.inward.sent, len.into());
                if let Ok(n) = side.program.write(&data) {
                    side.inward.sent += number(n);
                }
            }
            Step::ProgramReads(len) => {
                let mut data = vec![0; len.into()];
                if let Ok(n) = side.program.read(&mut data) {
                    let wanted = bytes(guest, side.outward.arrived, number(n));
                    assert_eq!(data[..n], wanted);
                    side.outward.arrived += number(n);
                    let all = side.outward.arrived == side.outward.sent;
                    assert!(n > 0 || side.outward.ended && all, "an end too early");
                }
            }
            Step::GuestReads(len) => {
                side.read = side.inward.arrived.min(side.read + u32::from(len));
                let update = side.packet(Op::CreditUpdate, guest);
                self.bench.muxer.receive(&update, &[]);
            }
            Step::ProgramEnds if !side.inward.ended => {
                side.inward.ended = true;
                side.program.shutdown(Shutdown::Write).unwrap();
            }
            Step::GuestEnds if side.answered && !side.outward.ended => {
                side.outward.ended = true;
                let end = Header {
                    flags: NO_SEND,
                    ..side.packet(Op::Shutdown, guest)
                };
                self.bench.muxer.receive(&end, &[]);
            }
            _ => {}
        }
    }

    fn take(&mut self) {
        let Some((header, data)) = self.bench.next() else {
            return;
        };
        let guest = header.dst_port;
        let side = self.sides[guest as usize].as_mut().unwrap();
        side.host_forwarded = header.fwd_cnt;
        assert!(header.fwd_cnt <= side.outward.sent);
        match header.op {
            Op::Response => side.answered = true,
            Op::Data => {
                let wanted = bytes(guest, side.inward.arrived, header.len);
                assert_eq!(data, wanted);
                side.inward.arrived += header.len;
                assert!(side.inward.arrived - side.read <= GUEST_ROOM);
                assert!(!side.told_end);
            }
            Op::Shutdown => {
                assert_ne!(header.flags & NO_SEND, 0);
                assert!(side.inward.ended && side.inward.arrived == side.inward.sent);
                side.told_end = true;
            }
            Op::CreditUpdate => {}
            Op::CreditRequest => {
                let update = side.packet(Op::CreditUpdate, guest);
                self.bench.muxer.receive(&update, &[]);
            }
            other => panic!("{other:?}: no side broke a rule"),
        }
    }

    /// All that is under way arrives.
    fn finish(&mut self) {
        for _ in 0..20_000 {
            for guest in 0..MOST {
                self.act(guest, Step::GuestReads(u16::MAX));
                self.act(guest, Step::ProgramReads(u16::MAX));
            }
            self.take();
            let done = |side: &Side| {
                let both = [&side.inward, &side.outward];
                both.iter().all(|s| s.sent == s.arrived) && side.told_end == side.inward.ended
            };
            if self.sides.iter().flatten().all(done) {
                return;
            }
        }
        panic!("something did not arrive");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn streams_arrive_whole(steps in prop::collection::vec(step(), 1..120)) {
        let mut run = Run { bench: Bench::new(), sides: [const { None }; MOST as usize] };
        for (guest, step) in steps {
            run.act(guest, step);
        }
        run.finish();
    }
}
