//! The keyboard controller, as far as a guest without a keyboard needs it: command `0xFE` on port
//! 0x64 resets the machine.

use serde::{Deserialize, Serialize};
use vm_superio::I8042Device;

use crate::bus::BusDevice;
use crate::trigger::{SuperIo, Trigger};

/// First port of the controller.
pub const I8042_BASE: u64 = 0x60;
/// Ports 0x60 to 0x64.
pub const I8042_LEN: u64 = 5;

/// What has to travel of the controller: nothing yet, it keeps no register between two accesses.
/// A type of its own, so that the day it keeps one, old states say so by their version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {}

/// The i8042 with its reset line.
pub struct I8042 {
    inner: I8042Device<SuperIo>,
}

impl I8042 {
    /// A controller that pokes `reset` when the guest asks for a reset.
    #[must_use]
    pub fn new(reset: Box<dyn Trigger>) -> Self {
        Self {
            inner: I8042Device::new(SuperIo(reset)),
        }
    }

    /// The state to carry to another host.
    #[must_use]
    pub fn save(&self) -> I8042State {
        I8042State {}
    }

    /// Takes over a state saved elsewhere.
    pub fn restore(&mut self, _state: &I8042State) {}
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (i, byte) in (0u64..).zip(data) {
            *byte = self.inner.read(port(offset + i));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (i, byte) in (0u64..).zip(data) {
            // A reset that cannot be signalled leaves the guest where it is; it will try again or
            // triple-fault, which is how guests insist.
            let _ = self.inner.write(port(offset + i), *byte);
        }
    }
}

/// The bus has checked that the access lies inside the device.
fn port(offset: u64) -> u8 {
    u8::try_from(offset).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    struct Count(Arc<AtomicUsize>);
    impl Trigger for Count {
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    #[test]
    fn only_fe_on_the_command_port_resets() {
        let resets = Arc::new(AtomicUsize::new(0));
        let mut dev = I8042::new(Box::new(Count(resets.clone())));
        dev.write(4, &[0xfd]);
        dev.write(0, &[0xfe]);
        assert_eq!(resets.load(Ordering::SeqCst), 0);
        dev.write(4, &[0xfe]);
        assert_eq!(resets.load(Ordering::SeqCst), 1);
        let mut status = [0xff];
        dev.read(4, &mut status);
        assert_eq!(status, [0], "neither buffer is ever full");
    }
}
