//! A network card: virtio-net (§5.1) over a tap device, or whatever else takes frames.
//!
//! One pair of queues, and a control queue for acknowledging announcements. Checksums and TCP
//! segmentation are left to the host or the guest, as negotiated; frames carry
//! `struct virtio_net_hdr_v1` through the tap (IFF_VNET_HDR), which also is what the guest's
//! buffers hold. Received frames may be spread over buffers (MRG_RXBUF).
//!
//! A frame for which the guest has no buffer waits, one only; the others wait in the tap's queue,
//! which drops what it has no room for. A frame that waits in a pause is lost to the guest that
//! goes on elsewhere: networks are like that, and the sender's retry finds the new host.
//!
//! After a migration [`Net::announce`] tells the switches where the guest's address is now, by a
//! RARP request in the guest's name, and asks the guest to tell its neighbours (GUEST_ANNOUNCE),
//! where its driver can.

mod frame;

use std::io;
use std::os::fd::OwnedFd;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

pub use frame::{HEADER, MAX_FRAME, MacAddress, rarp};

pub use crate::state::NetState;
use crate::virtio::{
    Buffer, COMMON_FEATURES, Context, Device, DeviceState, Kind, Memory, RestoreError, Sparse,
    Violation,
};

const RX: usize = 0;
const TX: usize = 1;
const CONTROL: usize = 2;
const QUEUE_SIZES: &[u16] = &[256, 256, 64];
const NAME: &str = "network card";
/// Frames that are taken from the backend before others get their turn.
const BATCH: usize = 256;
/// Class and command of the control queue's message that an announcement was made (§5.1.6.5.4).
const ANNOUNCE_ACK: [u8; 2] = [3, 0];
const CONTROL_OK: u8 = 0;
const CONTROL_ERROR: u8 = 1;

/// Work that the guest lets the host leave undone in frames for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums.
    pub checksum: bool,
    /// Segmentation of TCP over IPv4.
    pub tso4: bool,
    /// Segmentation of TCP over IPv6.
    pub tso6: bool,
}

/// Where frames go and come from. Each begins with the [`HEADER`] bytes of `virtio_net_hdr_v1`.
pub trait Backend: Send + 'static {
    /// Reads one frame; `WouldBlock` when there is none.
    ///
    /// # Errors
    /// The backend's.
    fn read(&mut self, frame: &mut [u8]) -> io::Result<usize>;

    /// Writes one frame.
    ///
    /// # Errors
    /// The backend's; the frame is lost.
    fn write(&mut self, frame: &[u8]) -> io::Result<()>;

    /// What the guest takes undone.
    ///
    /// # Errors
    /// The backend's; all is done for the guest then.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// Readable when there is a frame.
    ///
    /// # Errors
    /// When it cannot be duplicated.
    fn readable(&self) -> io::Result<OwnedFd>;
}

/// A network card.
pub struct Net {
    backend: Box<dyn Backend>,
    state: NetState,
    features: u64,
    /// A frame from the backend for which the guest has no buffer: so many bytes of `buffer`.
    pending: Option<usize>,
    /// The backend is gone: it would be readable for ever, with nothing but errors. It is not
    /// waited for until a frame of the guest's goes through.
    gone: bool,
    buffer: Vec<u8>,
    /// For frames of the guest's: in the other one a frame for it may wait.
    sending: Vec<u8>,
    dropped: Sparse,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Net").field(&self.state).finish()
    }
}

const fn bit(feature: u32) -> u64 {
    1 << feature
}

impl Net {
    /// A card with this address.
    #[must_use]
    pub fn new(backend: Box<dyn Backend>, mac: MacAddress) -> Self {
        Self {
            backend,
            state: NetState {
                mac,
                announce: false,
            },
            features: 0,
            pending: None,
            gone: false,
            buffer: vec![0; MAX_FRAME],
            sending: vec![0; MAX_FRAME],
            dropped: Sparse::default(),
        }
    }

    /// Its address.
    #[must_use]
    pub fn mac(&self) -> MacAddress {
        self.state.mac
    }

    /// Tells the network that the guest is here now. To be called through
    /// [`reconfigure`](crate::virtio::VirtioDevice::reconfigure) once the guest runs; switches may
    /// lose a frame, so do it a few times.
    ///
    /// # Errors
    /// The backend's; the guest was asked to announce itself nevertheless, where it can.
    pub fn announce(&mut self) -> io::Result<()> {
        self.state.announce = self.has(VIRTIO_NET_F_GUEST_ANNOUNCE);
        self.backend.write(&rarp(self.state.mac))
    }

    const fn has(&self, feature: u32) -> bool {
        self.features & bit(feature) != 0
    }

    fn lost(&mut self, why: &dyn std::fmt::Display) {
        if let Some(times) = self.dropped.count() {
            tracing::debug!(mac = %self.state.mac, times, "a frame was dropped: {why}");
        }
    }

    /// A tap whose interface was deleted answers every read with an error (EBADFD): it is not asked
    /// again, and the guest sees its cable pulled.
    fn lose_link(&mut self, error: &io::Error) {
        self.gone = true;
        tracing::warn!(mac = %self.state.mac, %error, "a network card's tap cannot be used any more; the guest has no link");
    }

    /// A frame of the guest's went through: the backend is there, again or still.
    fn regain_link<M: Memory>(&mut self, cx: &mut Context<'_, M>) {
        if std::mem::take(&mut self.gone) {
            cx.interrupt.config();
        }
    }

    /// Takes frames from the backend while there are any, and buffers for them.
    fn receive<M: Memory>(&mut self, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        for _ in 0..BATCH {
            let len = match self.pending.take() {
                Some(len) => len,
                None => match self.backend.read(&mut self.buffer) {
                    Ok(len) => len.min(self.buffer.len()),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => {
                        self.lose_link(&error);
                        cx.interrupt.config();
                        return Ok(());
                    }
                },
            };
            if len < HEADER {
                self.lost(&"it has no header");
                continue;
            }
            if !self.deliver(cx, len)? {
                self.pending = Some(len);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Puts the frame in `buffer` into the guest's buffers; `false` when there are too few.
    fn deliver<M: Memory>(
        &mut self,
        cx: &mut Context<'_, M>,
        len: usize,
    ) -> Result<bool, Violation> {
        let queue = &mut cx.queues[RX];
        let mut room: Vec<(u16, Buffer, usize)> = Vec::new();
        let mut total = 0;
        while total < len {
            let Some(chain) = queue.pop(cx.memory)? else {
                for (head, ..) in room.iter().rev() {
                    queue.put_back(*head);
                }
                return Ok(false);
            };
            let size = usize::try_from(chain.writable.len()).unwrap_or(usize::MAX);
            if size < HEADER {
                let (head, what) = (chain.head, "no room for a frame's header");
                return Err(Violation::Shape { head, what });
            }
            total = total.saturating_add(size);
            room.push((chain.head, chain.writable, size));
            if !self.has(VIRTIO_NET_F_MRG_RXBUF) && total < len {
                // One buffer is all that a frame may have: this one waits for a smaller frame.
                for (head, ..) in &room {
                    queue.put_back(*head);
                }
                self.lost(&"the guest's buffers are too small for it");
                return Ok(true);
            }
        }
        let count = u16::try_from(room.len()).unwrap_or(u16::MAX);
        frame::set_buffers(&mut self.buffer, count);
        let mut rest = &self.buffer[..len];
        let mut used = Vec::with_capacity(room.len());
        for (head, buffer, size) in room {
            let (now, later) = rest.split_at(rest.len().min(size));
            buffer.write(cx.memory, now)?;
            used.push((head, u32::try_from(now.len()).unwrap_or(u32::MAX)));
            rest = later;
        }
        queue.complete_together(cx.memory, &used)?;
        Ok(true)
    }

    fn transmit<M: Memory>(&mut self, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        while let Some(chain) = cx.queues[TX].pop(cx.memory)? {
            let len = usize::try_from(chain.readable.len()).unwrap_or(usize::MAX);
            if len <= HEADER || len > self.sending.len() {
                self.lost(&format_args!("the guest sent {len} bytes"));
            } else {
                let frame = &mut self.sending[..len];
                chain.readable.read(cx.memory, frame)?;
                if !frame::may_be_sent(frame, self.features) {
                    self.lost(&"it asks for an offload that was not negotiated");
                } else if let Err(error) = self.backend.write(frame) {
                    self.lost(&error);
                } else {
                    self.regain_link(cx);
                }
            }
            cx.queues[TX].complete(cx.memory, chain.head, 0)?;
        }
        Ok(())
    }

    fn control<M: Memory>(&mut self, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        while let Some(mut chain) = cx.queues[CONTROL].pop(cx.memory)? {
            let ack = chain.writable.take_back(1);
            let mut command = [0; 2];
            let n = chain.readable.read(cx.memory, &mut command)?;
            let answer = if n == 2 && command == ANNOUNCE_ACK {
                self.state.announce = false;
                CONTROL_OK
            } else {
                CONTROL_ERROR
            };
            let written = ack.write(cx.memory, &[answer])?;
            let written = u32::try_from(written).unwrap_or(0);
            cx.queues[CONTROL].complete(cx.memory, chain.head, written)?;
        }
        Ok(())
    }

    fn set_offloads(&mut self) {
        let offloads = Offloads {
            checksum: self.has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: self.has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: self.has(VIRTIO_NET_F_GUEST_TSO6),
        };
        if let Err(error) = self.backend.set_offloads(offloads) {
            tracing::warn!(%error, mac = %self.state.mac, "the network card's offloads could not be set");
        }
    }
}

impl<M: Memory> Device<M> for Net {
    fn kind(&self) -> Kind {
        Kind {
            id: VIRTIO_ID_NET,
            name: NAME,
            queue_sizes: QUEUE_SIZES,
        }
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
        ]
        .iter()
        .fold(COMMON_FEATURES, |all, feature| all | bit(*feature))
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let announce = if self.state.announce {
            VIRTIO_NET_S_ANNOUNCE
        } else {
            0
        };
        let link = if self.gone { 0 } else { VIRTIO_NET_S_LINK_UP };
        let status = link | announce;
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.state.mac.0);
        config[6] = u8::try_from(status).unwrap_or(0);
        crate::virtio::copy_config(&config, offset, data);
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        self.set_offloads();
    }

    fn reset(&mut self) {
        self.features = 0;
        self.pending = None;
        self.state.announce = false;
        self.set_offloads();
    }

    fn queue_ready(&mut self, index: usize, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        match index {
            RX => self.receive(cx),
            TX => self.transmit(cx),
            _ => self.control(cx),
        }
    }

    fn source(&self) -> io::Result<Option<OwnedFd>> {
        self.backend.readable().map(Some)
    }

    fn wants_source(&self) -> bool {
        // With a frame in hand it is the guest's buffers that are waited for.
        self.pending.is_none() && !self.gone
    }

    fn source_ready(&mut self, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        self.receive(cx)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(self.state.clone())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Net(state) = state else {
            return Err(RestoreError::Kind {
                saved: state.name(),
                here: NAME,
            });
        };
        self.state = state.clone();
        self.pending = None;
        Ok(())
    }
}
