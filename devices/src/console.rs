//! A console: virtio-console (§5.3) with one port.
//!
//! The guest's output goes to a writer that never waits. What the writer does not take is dropped
//! and counted, as [`serial`](crate::serial) does it. Input waits in a bounded queue until the
//! driver has a buffer for it; the queue travels, so that what was typed before a move is read
//! after it.
//!
//! Input is handed to the worker by an eventfd: a thread that types touches no guest memory, which
//! may not have arrived.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use crate::virtio::{
    Buffer, COMMON_FEATURES, Context, Device, DeviceState, Event, Kind, Memory, RestoreError,
    Violation,
};

pub use crate::serial::INPUT_LIMIT;
pub use crate::state::ConsoleState;

/// The configuration has the terminal's size.
const F_SIZE: u64 = 1 << 0;
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: &[u16] = &[64, 64];
const NAME: &str = "console";
/// Bytes that are copied out of the guest at a time.
const PIECE: usize = 16 << 10;
/// Bytes taken of one buffer; what is beyond is dropped. Linux writes at most 32 KiB at once.
const MOST: u64 = 1 << 20;
/// Bytes of output that are taken before others get their turn.
const BATCH: u64 = 1 << 20;

/// A console.
pub struct Console {
    output: Box<dyn Write + Send>,
    input: VecDeque<u8>,
    size: (u16, u16),
    /// Readable when the worker is to look at the input.
    typed: Event,
    lost: Arc<AtomicU64>,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console")
            .field("input", &self.input.len())
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl Console {
    /// A console whose output goes to `output`, which must not block: the worker waits for it, and
    /// so does a pause.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(output: Box<dyn Write + Send>) -> io::Result<Self> {
        Ok(Self {
            output,
            input: VecDeque::new(),
            size: (0, 0),
            typed: Event::new()?,
            lost: Arc::default(),
            buffer: vec![0; PIECE],
        })
    }

    /// Gives the guest `bytes` to read. Returns how many were taken: the queue is bounded by
    /// [`INPUT_LIMIT`]. To be called through
    /// [`try_while_running`](crate::virtio::VirtioDevice::try_while_running): what a device that
    /// rests is given may be missing from its state.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(INPUT_LIMIT - self.input.len());
        self.input.extend(&bytes[..taken]);
        self.typed.signal();
        taken
    }

    /// Says how large the terminal is; whether that is news. To be called through
    /// [`try_reconfigure`](crate::virtio::VirtioDevice::try_reconfigure).
    pub fn set_size(&mut self, columns: u16, rows: u16) -> bool {
        std::mem::replace(&mut self.size, (columns, rows)) != (columns, rows)
    }

    /// Counts the bytes of output that the writer refused.
    #[must_use]
    pub fn lost_output(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.lost)
    }

    fn receive<M: Memory>(&mut self, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        while !self.input.is_empty() {
            let Some(chain) = cx.queues[RX].pop(cx.memory)? else {
                return Ok(());
            };
            let (front, _) = self.input.as_slices();
            let written = chain.writable.write(cx.memory, front)?;
            if written == 0 {
                let (head, what) = (chain.head, "no room for input");
                return Err(Violation::Shape { head, what });
            }
            self.input.drain(..written);
            let written = u32::try_from(written).unwrap_or(u32::MAX);
            cx.queues[RX].complete(cx.memory, chain.head, written)?;
        }
        Ok(())
    }

    fn transmit<M: Memory>(&mut self, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        let mut taken = 0;
        while taken < BATCH {
            let Some(chain) = cx.queues[TX].pop(cx.memory)? else {
                return Ok(());
            };
            taken += self.print(cx.memory, chain.readable)?;
            cx.queues[TX].complete(cx.memory, chain.head, 0)?;
        }
        cx.queues[TX].again();
        Ok(())
    }

    /// Returns how many bytes were looked at.
    fn print<M: Memory>(&mut self, memory: &M, mut text: Buffer) -> Result<u64, Violation> {
        let wanted = text.len().min(MOST);
        self.lose(text.len() - wanted);
        let mut left = usize::try_from(wanted).unwrap_or(0);
        while left > 0 {
            let n = left.min(PIECE);
            let piece = text.take_front(u64::try_from(n).unwrap_or(0));
            piece.read(memory, &mut self.buffer[..n])?;
            self.write(n);
            left -= n;
        }
        // A flush that fails says nothing about which bytes are lost; the next write will.
        let _ = self.output.flush();
        Ok(wanted)
    }

    /// Passes on the first `n` bytes of the buffer.
    fn write(&mut self, n: usize) {
        let mut rest = &self.buffer[..n];
        while !rest.is_empty() {
            match self.output.write(rest) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => {
                    let lost = u64::try_from(rest.len()).unwrap_or(0);
                    self.lose(lost);
                    return;
                }
                Ok(taken) => rest = rest.get(taken..).unwrap_or_default(),
            }
        }
    }

    fn lose(&self, bytes: u64) {
        self.lost.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl<M: Memory> Device<M> for Console {
    fn kind(&self) -> Kind {
        Kind {
            id: VIRTIO_ID_CONSOLE,
            name: NAME,
            queue_sizes: QUEUE_SIZES,
        }
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | F_SIZE
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let ([a, b], [c, d]) = (self.size.0.to_le_bytes(), self.size.1.to_le_bytes());
        crate::virtio::copy_config(&[a, b, c, d], offset, data);
    }

    fn activate(&mut self, _features: u64) {}

    /// What was typed stays: it is for the next driver.
    fn reset(&mut self) {}

    fn queue_ready(&mut self, index: usize, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        match index {
            RX => self.receive(cx),
            _ => self.transmit(cx),
        }
    }

    fn source(&self) -> io::Result<Option<OwnedFd>> {
        Ok(Some(self.typed.try_clone()?.into()))
    }

    fn source_ready(&mut self, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        self.typed.drain();
        self.receive(cx)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Console(ConsoleState {
            input: self.input.iter().copied().collect(),
            columns: self.size.0,
            rows: self.size.1,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Console(state) = state else {
            return Err(RestoreError::Kind {
                saved: state.name(),
                here: NAME,
            });
        };
        if state.input.len() > INPUT_LIMIT {
            return Err(RestoreError::Registers {
                here: NAME,
                what: "more input than a console keeps",
            });
        }
        self.input = state.input.iter().copied().collect();
        self.size = (state.columns, state.rows);
        Ok(())
    }
}
