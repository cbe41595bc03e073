//! A dirty trace that is anything at all.

use super::link::put_crc;
use ferry_migration::model::{Activity, Replay};
use ferry_migration::page::PageSet;
use ferry_migration::trace::{MAGIC, Trace};

/// Bytes of a frame's head.
const HEAD: usize = 24;

/// A dirty trace, as it is and with its checksums made right: it is refused, or its pages are the
/// guest's and as many as it says, and it is replayed in the order of time. Returns whether it can
/// be replayed once its checksums are right.
pub fn trace(bytes: &[u8]) -> bool {
    let _ = replay(bytes);
    replay(&mend(bytes))
}

fn replay(bytes: &[u8]) -> bool {
    let Ok(trace) = Trace::read(bytes) else {
        return false;
    };
    let layout = &trace.header().layout;
    let mut pages = PageSet::new(layout.end());
    // Of a guest of up to 1 TiB: all frames' pages one by one would take more time than a target
    // has.
    for frame in trace.frames().iter().take(8) {
        pages.clear();
        trace.pages_of(frame, &mut pages);
        assert_eq!(pages.len(), frame.pages());
        assert!(pages.runs().all(|run| layout.contains(run)));
        assert!(frame.from() <= frame.to());
    }
    let most = trace.frames().iter().map(|frame| frame.pages()).max();
    if most.is_some_and(|most| most > 1 << 16) {
        return true;
    }
    let mut replay = Replay::new(&trace, 1);
    let mut last = 0.0;
    for _ in 0..100 {
        let Some(touch) = replay.peek() else { break };
        assert!(touch.at >= last && touch.gfn < layout.end());
        last = touch.at;
        replay.pop();
    }
    true
}

fn length(bytes: &[u8], at: usize) -> usize {
    let field = bytes.get(at..).and_then(<[u8]>::first_chunk::<4>);
    usize::try_from(field.map_or(0, |field| u32::from_le_bytes(*field))).unwrap()
}

/// Makes the checksums right, as far as the trace can be followed.
fn mend(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let header = MAGIC.len() + 6;
    let end = header + length(&bytes, header - 4);
    put_crc(&mut bytes, end);
    let mut rest = bytes.get_mut(end + 4..).unwrap_or_default();
    while rest.len() >= HEAD {
        let (head, body) = rest.split_at_mut(HEAD);
        let (payload, after) = body.split_at_mut(length(head, 12).min(body.len()));
        head[16..20].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
        put_crc(head, 20);
        rest = after;
    }
    bytes
}
