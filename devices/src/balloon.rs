//! The memory balloon: virtio-balloon (§5.5) with statistics and free-page reporting.
//!
//! Three ways for a guest to say that it does not need a page: it inflates the balloon to the size
//! that the host asks for, or reports pages that lie free anyway. Both end in [`FreePages`], which
//! gives the memory back to the host. A page that was given back holds nothing, so a migration has
//! nothing to send of it.
//!
//! The driver may leave out the statistics, or the reporting: the queues are numbered without a
//! gap, as Linux' driver does on MMIO, so which queue is which depends on the features.

pub mod auto;
mod statistics;

use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::{Address, GuestAddress};

pub use statistics::Statistics;

pub use crate::state::BalloonState;
use crate::virtio::{
    COMMON_FEATURES, Chain, Context, Device, DeviceState, DrainError, Kind, Memory, RestoreError,
    Violation, check_ram,
};

/// Bytes of the pages that a balloon counts in.
pub const PAGE: u64 = 4096;

const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_REPORTING: u64 = 1 << 5;
const QUEUE_SIZES: &[u16] = &[256, 256, 16, 64];
const NAME: &str = "balloon";
/// Bytes of a page's number.
const NUMBER: usize = 4;
/// Page numbers that a driver may give at once; Linux' gives 256.
const MOST_NUMBERS: u64 = 4096;
/// Lists of page numbers that are worked off before others get their turn: giving memory back takes
/// the host some time.
const LISTS: usize = 8;

/// What becomes of pages that the guest gives and takes. Called with the device's lock held, for
/// pages that are RAM.
pub trait FreePages: Send + Sync + 'static {
    /// The guest does not need the contents of `count` pages from page number `first`: they went
    /// into the balloon.
    fn inflated(&self, first: u64, count: u64);

    /// The guest uses `count` pages from number `first` again.
    fn deflated(&self, first: u64, count: u64);

    /// `count` pages from number `first` are free in the guest. It may use them again at any time,
    /// without a word, and finds zeros or what they held.
    fn reported(&self, first: u64, count: u64);
}

/// When the last statistics came to this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    /// The number of statistics that have come so far.
    pub times: u64,
    /// When they came.
    pub at: Instant,
    /// Pages that were in the balloon then, as the driver said.
    pub actual: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
    None,
}

/// A balloon.
pub struct Balloon {
    pages: Arc<dyn FreePages>,
    state: BalloonState,
    features: u64,
    /// The statistics' buffer, which the device keeps until it wants new ones.
    held: Option<u16>,
    told: Option<Told>,
}

impl std::fmt::Debug for Balloon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Balloon").field(&self.state).finish()
    }
}

impl Balloon {
    /// An empty balloon.
    #[must_use]
    pub fn new(pages: Arc<dyn FreePages>) -> Self {
        Self {
            pages,
            state: BalloonState::default(),
            features: 0,
            held: None,
            told: None,
        }
    }

    /// Asks the guest for pages of 4 KiB; it gives them as it can. To be called through
    /// [`reconfigure`](crate::virtio::VirtioDevice::reconfigure).
    pub fn set_target(&mut self, pages: u32) {
        self.state.target = pages;
    }

    /// Pages asked for.
    #[must_use]
    pub fn target(&self) -> u32 {
        self.state.target
    }

    /// Pages in the balloon, as the driver says.
    #[must_use]
    pub fn actual(&self) -> u32 {
        self.state.actual
    }

    /// Whether the guest has a driver for it: without one nothing goes in or out.
    #[must_use]
    pub fn has_driver(&self) -> bool {
        self.features != 0
    }

    /// What the guest last said about its memory.
    #[must_use]
    pub fn statistics(&self) -> Option<&Statistics> {
        self.state.statistics.as_ref()
    }

    /// When it said that; `None` when it said it to another host.
    #[must_use]
    pub fn told(&self) -> Option<Told> {
        self.told
    }

    /// Whether the target is to be moved automatically, and how. Who owns the device does it, by
    /// [`auto::Controller`]; here the wish is kept, since it goes where the guest goes.
    pub fn set_auto(&mut self, settings: Option<auto::Settings>) {
        self.state.auto = settings;
    }

    /// As set by [`set_auto`](Self::set_auto), here or where the guest came from.
    #[must_use]
    pub fn auto(&self) -> Option<auto::Settings> {
        self.state.auto
    }

    /// Asks the guest for new statistics, which come when it is ready. `false` when it has not
    /// answered the last question yet, or never will. To be called through
    /// [`with_queues`](crate::virtio::VirtioDevice::with_queues).
    ///
    /// # Errors
    /// [`Violation`].
    pub fn ask_statistics<M: Memory>(
        &mut self,
        cx: &mut Context<'_, M>,
    ) -> Result<bool, Violation> {
        let (Some(index), Some(head)) = (self.index(Role::Statistics), self.held.take()) else {
            return Ok(false);
        };
        cx.queues[index].complete(cx.memory, head, 0)?;
        Ok(true)
    }

    fn role(&self, index: usize) -> Role {
        let stats = self.features & F_STATS_VQ != 0;
        let reporting = self.features & F_PAGE_REPORTING != 0;
        match (index, stats) {
            (0, _) => Role::Inflate,
            (1, _) => Role::Deflate,
            (2, true) => Role::Statistics,
            (2, false) | (3, true) if reporting => Role::Reporting,
            _ => Role::None,
        }
    }

    fn index(&self, role: Role) -> Option<usize> {
        (0..QUEUE_SIZES.len()).find(|index| self.role(*index) == role)
    }

    /// The numbers of pages that went in or out.
    fn numbers<M: Memory>(&self, memory: &M, chain: &Chain, role: Role) -> Result<(), Violation> {
        let list = &chain.readable;
        if list.len() > MOST_NUMBERS * 4 {
            let (head, what) = (chain.head, "more page numbers than are taken at once");
            return Err(Violation::Shape { head, what });
        }
        let mut bytes = vec![0; usize::try_from(list.len()).unwrap_or(0)];
        list.read(memory, &mut bytes)?;
        let (numbers, _) = bytes.as_chunks::<NUMBER>();
        let mut numbers: Vec<u32> = numbers.iter().map(|n| u32::from_le_bytes(*n)).collect();
        // Drivers give them in any order, and neighbours are cheaper together.
        numbers.sort_unstable();
        numbers.dedup();
        for run in numbers.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            let Some(first) = run.first().map(|n| u64::from(*n)) else {
                continue;
            };
            let count = u64::try_from(run.len()).unwrap_or(0);
            check_ram(memory, "page", GuestAddress(first * PAGE), count * PAGE)?;
            match role {
                Role::Deflate => self.pages.deflated(first, count),
                _ => self.pages.inflated(first, count),
            }
        }
        Ok(())
    }

    fn report(&self, chain: &Chain) {
        for segment in chain.writable.segments() {
            let start = segment.address.raw_value();
            let first = start.div_ceil(PAGE);
            let end = (start + u64::from(segment.len)) / PAGE;
            if end > first {
                self.pages.reported(first, end - first);
            }
        }
    }
}

impl<M: Memory> Device<M> for Balloon {
    fn kind(&self) -> Kind {
        Kind {
            id: VIRTIO_ID_BALLOON,
            name: NAME,
            queue_sizes: QUEUE_SIZES,
        }
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_REPORTING
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let [a, b, c, d] = self.state.target.to_le_bytes();
        let [e, f, g, h] = self.state.actual.to_le_bytes();
        crate::virtio::copy_config(&[a, b, c, d, e, f, g, h], offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // Only `actual` is the driver's, and it is written whole.
        if let (4, Ok(bytes)) = (offset, data.try_into()) {
            self.state.actual = u32::from_le_bytes(bytes);
        }
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
    }

    fn reset(&mut self) {
        self.features = 0;
        self.held = None;
        // A driver that starts anew has an empty balloon, and has said nothing.
        self.state.actual = 0;
        self.state.statistics = None;
    }

    fn queue_ready(&mut self, index: usize, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        let role = self.role(index);
        if role == Role::None {
            return Ok(());
        }
        for _ in 0..LISTS {
            let Some(chain) = cx.queues[index].pop(cx.memory)? else {
                return Ok(());
            };
            let head = chain.head;
            match role {
                Role::Statistics => {
                    let mut bytes = [0; statistics::ENTRY * statistics::MOST];
                    let n = chain.readable.read(cx.memory, &mut bytes)?;
                    self.state.statistics = Some(Statistics::parse(&bytes[..n]));
                    self.told = Some(Told {
                        times: self.told.map_or(0, |told| told.times).wrapping_add(1),
                        at: Instant::now(),
                        actual: self.state.actual,
                    });
                    // Kept; a driver that gives a second gets the first back.
                    if let Some(old) = self.held.replace(head) {
                        cx.queues[index].complete(cx.memory, old, 0)?;
                    }
                    continue;
                }
                Role::Reporting => self.report(&chain),
                _ => self.numbers(cx.memory, &chain, role)?,
            }
            cx.queues[index].complete(cx.memory, head, 0)?;
        }
        cx.queues[index].again();
        Ok(())
    }

    /// The statistics' buffer goes back into its queue: who resumes the guest takes it from there.
    fn drain(&mut self, cx: &mut Context<'_, M>) -> Result<(), DrainError> {
        if let (Some(index), Some(head)) = (self.index(Role::Statistics), self.held.take()) {
            cx.queues[index].put_back(head);
        }
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon(Box::new(self.state.clone()))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Balloon(state) = state else {
            return Err(RestoreError::Kind {
                saved: state.name(),
                here: NAME,
            });
        };
        self.state.clone_from(state);
        self.held = None;
        self.told = None;
        Ok(())
    }
}
