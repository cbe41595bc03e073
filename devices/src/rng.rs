//! An entropy source: virtio-rng (§5.4) over the host's getrandom(2).

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

pub use crate::state::RngState;
use crate::virtio::{
    COMMON_FEATURES, Context, Device, DeviceState, Kind, Memory, RestoreError, Violation,
};

const QUEUE_SIZES: &[u16] = &[64];
/// Bytes given for one request; a driver that wants more asks again.
const MOST: usize = 64 << 10;

/// A source of random numbers.
#[derive(Debug, Default)]
pub struct Rng {
    buffer: Vec<u8>,
}

impl Rng {
    /// One that takes them from the host's kernel.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl<M: Memory> Device<M> for Rng {
    fn kind(&self) -> Kind {
        Kind {
            id: VIRTIO_ID_RNG,
            name: "random number generator",
            queue_sizes: QUEUE_SIZES,
        }
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn queue_ready(&mut self, _index: usize, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        while let Some(chain) = cx.queues[0].pop(cx.memory)? {
            let head = chain.head;
            let len = usize::try_from(chain.writable.len())
                .unwrap_or(MOST)
                .min(MOST);
            if len == 0 {
                let what = "no room for random bytes";
                return Err(Violation::Shape { head, what });
            }
            self.buffer.resize(len, 0);
            // A kernel that has none (before its pool is seeded it waits) gives the driver an empty
            // answer.
            let written = match getrandom::fill(&mut self.buffer) {
                Ok(()) => chain.writable.write(cx.memory, &self.buffer)?,
                Err(error) => {
                    tracing::warn!(%error, "the host has no random numbers for the guest");
                    0
                }
            };
            let written = u32::try_from(written).unwrap_or(0);
            cx.queues[0].complete(cx.memory, head, written)?;
        }
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng(RngState {})
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Rng(RngState {}) => Ok(()),
            other => Err(RestoreError::Kind {
                saved: other.name(),
                here: "random number generator",
            }),
        }
    }
}
