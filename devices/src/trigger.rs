use std::io;
use std::sync::Arc;

/// The way out of a device for an interrupt or another event: something that can be poked.
///
/// Implementations must not block and must not take a lock that is held while a device is accessed,
/// since a device triggers from inside an access of a vCPU.
pub trait Trigger: Send + Sync {
    /// Pokes the other side once.
    ///
    /// # Errors
    /// What the carrier of the event reports, e.g. an eventfd whose counter is full.
    fn trigger(&self) -> io::Result<()>;
}

impl<T: Trigger + ?Sized> Trigger for Arc<T> {
    fn trigger(&self) -> io::Result<()> {
        (**self).trigger()
    }
}

impl<T: Trigger + ?Sized> Trigger for Box<T> {
    fn trigger(&self) -> io::Result<()> {
        (**self).trigger()
    }
}

/// Carries a [`Trigger`] of ours into a device of `vm-superio`.
pub(crate) struct SuperIo(pub(crate) Box<dyn Trigger>);

impl vm_superio::Trigger for SuperIo {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}
