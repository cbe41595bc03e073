use std::io;

use ferry_devices::Trigger;
use vmm_sys_util::eventfd::EventFd;

/// An interrupt line of the in-kernel controller, raised through an irqfd: an edge for each
/// trigger.
///
/// The kernel injects from a work queue, so an edge may still be on its way when the triggering
/// vCPU stops; devices raise what is pending again when they are restored.
#[derive(Debug)]
pub struct IrqLine(pub(super) EventFd);

impl IrqLine {
    /// Another handle on the same line.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }
}

impl Trigger for IrqLine {
    fn trigger(&self) -> io::Result<()> {
        match self.0.write(1) {
            // The counter is full: edges are pending already, and one more would merge with them.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}
