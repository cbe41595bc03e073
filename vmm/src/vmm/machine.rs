//! A [`Machine`] as a [`Guest`].

use super::{Ending, Guest, Migration, MigrationHandle, Unconfirmed, Vmm};
use crate::api::types::GuestInfo;
use crate::machine::{Exit, Machine};
use crate::migrate::{Handle, Receiver, Uri, migrate, recover};
use ferry_migration::options::Options;
use ferry_migration::report::{Event, Progress, Report};
use std::io;
use std::sync::Arc;

/// A machine, owned by a [`Vmm`].
#[derive(Debug)]
pub struct MachineGuest {
    machine: Arc<Machine>,
}

impl MachineGuest {
    /// Wraps the machine.
    #[must_use]
    pub fn new(machine: Arc<Machine>) -> Arc<Self> {
        Arc::new(Self { machine })
    }

    /// From now on the VMM hears of the guest's own end.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn watch(&self, vmm: &Vmm) -> io::Result<()> {
        let (machine, vmm) = (Arc::clone(&self.machine), vmm.clone());
        let watch = move || match machine.wait() {
            Exit::Shutdown => vmm.guest_ended(Ending::Shutdown),
            Exit::Reset => vmm.guest_ended(Ending::Reset),
            Exit::Failure(why) => vmm.guest_ended(Ending::Failed(why)),
            // Whoever stopped it knows.
            Exit::Stopped => {}
        };
        std::thread::Builder::new()
            .name("ferry-watch".into())
            .spawn(watch)
            .map(drop)
    }
}

impl Guest for MachineGuest {
    fn info(&self) -> GuestInfo {
        let d = self.machine.description();
        GuestInfo {
            name: Some(d.name.clone()),
            memory_bytes: d.memory,
            cpus: d.cpus,
        }
    }

    fn pause(&self) -> Result<(), String> {
        self.machine
            .pause()
            .map_err(|e| e.to_string())?
            .keep_paused();
        Ok(())
    }

    fn resume(&self) -> Result<(), String> {
        self.machine.resume().map_err(|e| e.to_string())
    }

    fn stop(&self) {
        self.machine.stop();
    }

    fn power_button(&self) -> Result<(), String> {
        self.machine
            .press_power_button()
            .map_err(|e| format!("the power button's interrupt cannot be raised ({e})"))
    }

    fn input(&self, bytes: &[u8]) -> usize {
        self.machine.serial_input(bytes)
    }

    fn migration(&self, uri: &str) -> Result<Box<dyn Migration>, String> {
        let uri = uri.parse::<Uri>().map_err(|e| e.to_string())?;
        Ok(Box::new(MachineMigration {
            machine: Arc::clone(&self.machine),
            uri,
            handle: Handle::new(),
        }))
    }

    fn confirm(&self, uri: &str, session: &str) -> Result<(), String> {
        let uri = uri.parse::<Uri>().map_err(|e| e.to_string())?;
        recover(&uri, session).map_err(|e| e.to_string())
    }
}

struct MachineMigration {
    machine: Arc<Machine>,
    uri: Uri,
    handle: Handle,
}

impl Migration for MachineMigration {
    fn handle(&self) -> Arc<dyn MigrationHandle> {
        Arc::new(self.handle.clone())
    }

    fn run(self: Box<Self>, options: &Options, events: &mut dyn FnMut(Event)) -> Report {
        migrate(&self.machine, &self.uri, options, &self.handle, events)
    }
}

impl MigrationHandle for Handle {
    fn cancel(&self) -> bool {
        Handle::cancel(self)
    }

    fn progress(&self) -> Progress {
        Handle::progress(self)
    }
}

impl Unconfirmed for Receiver {
    fn take_over(&self) -> Result<(), String> {
        Receiver::take_over(self)
    }
}
