//! Writing a snapshot of a guest.
//!
//! ```text
//!  paused    pause ─▶ all pages, by all data channels ─▶ state ─▶ the caller lets it run ─▶ index, trailer
//!  live      log on ─▶ all pages ─▶ what was dirtied … ─▶ pause ─▶ the rest ─▶ state ─▶ …
//! ```
//!
//! What is in the file is the guest at the moment of its pause, either way. Each data channel takes
//! blocks of pages in turn, codes them and writes them to a place of its own in the file.

mod writer;

use super::places::Places;
use super::{Trailer, encode_head};
use crate::codec::Coding;
use crate::options::{Compress, Options};
use crate::page::{PageSet, RamLayout};
use crate::port::{Clock, Link, Paused, PortError, SourceVm};
use crate::report::Codecs;
use crate::sync::lock;
use crate::wire::{FLAG_CRC, Features, FrameType, Header, Hello, SessionId};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::time::Duration;
use writer::{DataChannel, Shared, write};

/// Bytes that can be written anywhere, by several threads.
pub trait WriteAt: Sync {
    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// The medium's.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
}

impl WriteAt for File {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }
}

impl WriteAt for Mutex<Vec<u8>> {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        let mut all = lock(self);
        let end = at + bytes.len();
        if all.len() < end {
            all.resize(end, 0);
        }
        all[at..end].copy_from_slice(bytes);
        Ok(())
    }
}

/// How a snapshot is written.
///
/// Built by functional update, `SaveOptions { …, ..SaveOptions::default() }`:
/// a new field has a default and breaks no caller. `#[non_exhaustive]` would forbid just that.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions {
    /// How pages are made smaller. Differences are never used.
    pub compress: Compress,
    /// Threads that code and write.
    pub threads: u16,
    /// The guest runs while most of its memory is written; what it dirties is written again.
    pub live: bool,
    /// With `live`: the pause that is good enough.
    pub downtime: Duration,
}

impl Default for SaveOptions {
    /// One thread, and a guest that stands still meanwhile.
    fn default() -> Self {
        Self {
            compress: Compress::Auto,
            threads: 1,
            live: false,
            downtime: Duration::from_millis(300),
        }
    }
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The guest.
    #[error("{0}")]
    Guest(PortError),
    /// The file.
    #[error("writing at byte {offset} failed: {source}")]
    Write {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The machine's configuration or state is too long for a frame.
    #[error("the machine's {what} has {bytes} bytes, which is more than a snapshot takes")]
    Long {
        /// Which.
        what: &'static str,
        /// How long it is.
        bytes: usize,
    },
    /// The caller cancelled it.
    #[error("the snapshot was cancelled")]
    Cancelled,
    /// A data channel failed inside.
    #[error("a thread that writes failed inside; the VMM's output says where")]
    Broken,
}

/// What was written.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Saved {
    /// Size of the file.
    pub bytes: u64,
    /// Pages of RAM.
    pub pages: u64,
    /// Of those, how many are in the file; the others are zero.
    pub data_pages: u64,
    /// Pages that were written and superseded (live).
    pub superseded: u64,
    /// Passes over memory, the one in the pause included.
    pub rounds: u32,
    /// When the last guest instruction was, by the clock.
    pub paused_at: Duration,
    /// Stopping the guest.
    pub quiesce: Duration,
    /// Writing pages while it stood still.
    pub pages_took: Duration,
    /// Reading and writing its state.
    pub state_took: Duration,
    /// Pages by coder.
    pub codecs: Codecs,
}

/// A frame of configuration or state.
fn frame(kind: FrameType, what: &'static str, payload: &[u8]) -> Result<Vec<u8>, SaveError> {
    let long = SaveError::Long {
        what,
        bytes: payload.len(),
    };
    let length = u32::try_from(payload.len()).ok();
    let Some(length) = length.filter(|length| *length <= kind.max_payload()) else {
        return Err(long);
    };
    let header = Header {
        flags: FLAG_CRC,
        length,
        payload_crc: crc32c::crc32c(payload),
        ..Header::bare(kind, 0)
    };
    Ok([&header.encode()[..], payload].concat())
}

/// Passes of a live snapshot before its pause.
const MOST_ROUNDS: u32 = 8;

/// What [`save`] needs besides a guest and a file.
pub struct SaveSetup<'a> {
    /// Names the snapshot.
    pub session: SessionId,
    /// How.
    pub options: SaveOptions,
    /// Time.
    pub clock: &'a dyn Clock,
    /// Whether the caller wants it to end.
    pub cancelled: &'a (dyn Fn() -> bool + Sync),
    /// The machine's configuration; asked for in the pause.
    pub describe: &'a mut dyn FnMut() -> Result<Vec<u8>, PortError>,
    /// Whether the guest goes on as before when it is no longer needed. Else it stands still, and
    /// its guard is returned.
    pub resume: bool,
    /// Called then, after the guest was resumed: what is still to be written is small.
    pub released: &'a mut dyn FnMut(&Saved),
}

impl std::fmt::Debug for SaveSetup<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SaveSetup")
            .field("session", &self.session)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// Writes a snapshot of the guest to an empty file. Afterwards the guest stands still, and its
/// guard is returned, unless it is to be resumed; after an error it goes on as it did before.
///
/// # Errors
/// [`SaveError`]; the file is then worth nothing.
pub fn save<'g, L: Link, G: SourceVm<L>, W: WriteAt>(
    guest: &'g G,
    file: &W,
    setup: SaveSetup<'_>,
) -> Result<(Saved, Option<Paused<'g>>), SaveError> {
    let SaveSetup {
        session,
        ref options,
        clock,
        cancelled,
        describe,
        resume,
        released,
    } = setup;
    let layout = guest.layout();
    let mut data_channels = data_channels(options, &layout);
    let shared = Shared {
        guest,
        file,
        clock,
        cancelled,
        places: Mutex::new(Places::new(&layout)),
        layout,
    };
    write(file, &encode_head(session), 0)?;
    let mut saved = Saved {
        pages: shared.layout.pages(),
        ..Saved::default()
    };
    let mut pending = shared.layout.all();
    if options.live {
        guest.start_tracking().map_err(SaveError::Guest)?;
    }
    let live = options.live.then(|| {
        rounds::<L, G, W>(
            &shared,
            &mut data_channels,
            options,
            &mut pending,
            &mut saved,
        )
    });
    let result = live.unwrap_or(Ok(())).and_then(|()| {
        let (state, paused) = stop::<L, G, W>(
            guest,
            &shared,
            &mut data_channels,
            options,
            &mut pending,
            &mut saved,
        )?;
        let machine = describe().map_err(SaveError::Guest)?;
        Ok((state, machine, paused))
    });
    for data_channel in &data_channels {
        saved.codecs.join(&data_channel.codecs);
    }
    // Where that failed, the guard was dropped: the guest runs.
    let result = result.map(|(state, machine, paused)| {
        // Dropped: the guest runs on.
        let paused = Some(paused).filter(|_| !resume);
        released(&saved);
        (state, machine, paused)
    });
    if options.live {
        // Not in the pause: it takes as long as the guest has memory.
        guest.stop_tracking();
    }
    let (state, machine, paused) = result?;
    finish(&shared, session, &machine, &state, &mut saved)?;
    Ok((saved, paused))
}

/// One for each thread that writes.
fn data_channels(options: &SaveOptions, layout: &RamLayout) -> Vec<DataChannel> {
    let coding = Coding::new(
        &Options {
            compress: match options.compress {
                Compress::Delta => Compress::Adaptive,
                other => other,
            },
            // Every page by itself: it is read without the others.
            delta_cache: 0,
            ..Options::default()
        },
        Features::SUPPORTED,
        layout.pages(),
        layout.end(),
    );
    let threads = options.threads.clamp(1, 64);
    (0..threads)
        .map(|_| DataChannel::new(coding.encoder()))
        .collect()
}

/// The live rounds; leaves what is to be written in the pause in `pending`.
fn rounds<L: Link, G: SourceVm<L>, W: WriteAt>(
    shared: &Shared<'_, G, W>,
    data_channels: &mut [DataChannel],
    options: &SaveOptions,
    pending: &mut PageSet,
    saved: &mut Saved,
) -> Result<(), SaveError> {
    loop {
        let began = shared.clock.now();
        let pages = pending.len();
        shared.pass::<L>(data_channels, pending, true)?;
        saved.rounds += 1;
        let took = shared.clock.now().saturating_sub(began).as_secs_f64();
        pending.clear();
        shared
            .guest
            .collect_dirty(pending)
            .map_err(SaveError::Guest)?;
        let left = pending.len();
        let predicted = took / pages.max(1) as f64 * left as f64;
        // Each further round costs the file as much as it saves the pause; where it saves little,
        // it is not worth it.
        let shrinks = left * 4 < pages * 3;
        if predicted <= options.downtime.as_secs_f64() || !shrinks || saved.rounds >= MOST_ROUNDS {
            return Ok(());
        }
    }
}

/// Stops the guest and writes what is pending; returns its state and the guest.
fn stop<'g, L: Link, G: SourceVm<L>, W: WriteAt>(
    guest: &'g G,
    shared: &Shared<'_, G, W>,
    data_channels: &mut [DataChannel],
    options: &SaveOptions,
    pending: &mut PageSet,
    saved: &mut Saved,
) -> Result<(Vec<u8>, Paused<'g>), SaveError> {
    let now = || shared.clock.now();
    let asked = now();
    let paused = guest.pause().map_err(SaveError::Guest)?;
    let ago = paused.stopped_for();
    saved.paused_at = ago.map_or(asked, |ago| now().saturating_sub(ago));
    if options.live {
        shared
            .guest
            .collect_dirty(pending)
            .map_err(SaveError::Guest)?;
    }
    let stopped = now();
    saved.quiesce = stopped.saturating_sub(saved.paused_at);
    shared.pass::<L>(data_channels, pending, false)?;
    saved.rounds += 1;
    let written = now();
    saved.pages_took = written.saturating_sub(stopped);
    let state = paused.save(None).map_err(SaveError::Guest)?;
    saved.state_took = now().saturating_sub(written);
    Ok((state, paused))
}

/// Configuration, state, index and trailer.
fn finish<G, W: WriteAt>(
    shared: &Shared<'_, G, W>,
    session: SessionId,
    machine: &[u8],
    state: &[u8],
    saved: &mut Saved,
) -> Result<(), SaveError> {
    let places = lock(&shared.places);
    let used = saved.codecs;
    let mut required = 0;
    if used.zstd.pages > 0 {
        required |= Features::ZSTD.0;
    }
    if used.sparse.pages + used.copied.pages > 0 {
        required |= Features::PATCH.0;
    }
    let hello = Hello {
        offered: Features(required),
        required: Features(required),
        layout: shared.layout.clone(),
        channels: 0,
        disks: Vec::new(),
        faults: 0,
        policy: "snapshot".into(),
        machine: machine.to_vec(),
    };
    let contents = places.end;
    let mut tail = frame(FrameType::Hello, "configuration", &hello.encode())?;
    let state_at = contents + tail.len() as u64;
    tail.extend(frame(FrameType::State, "state", state)?);
    let index_at = contents + tail.len() as u64;
    let (index, pages) = places.entries(&shared.layout);
    let trailer = Trailer {
        contents,
        state: state_at,
        index: index_at,
        entries: (index.len() / super::ENTRY_BYTES) as u64,
        index_crc: crc32c::crc32c(&index),
        session,
    };
    tail.extend_from_slice(&index);
    tail.extend_from_slice(&trailer.encode());
    write(shared.file, &tail, contents)?;
    saved.bytes = contents + tail.len() as u64;
    saved.data_pages = pages;
    saved.superseded = places.written - pages;
    Ok(())
}
