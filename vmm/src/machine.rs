//! A virtual machine: built paused, loaded or restored, run, paused, saved.
//!
//! ```text
//!            build                resume
//!  builder ────────▶ Paused ◀──────────────▶ Running
//!                      │          pause         │
//!                      │                        │ guest shuts down, resets, or KVM fails
//!                      └────────▶ Ended ◀───────┘
//!                         stop
//! ```
//!
//! Each vCPU has a thread that is parked unless the machine runs. [`Machine::pause`] returns a
//! guard, [`PausedMachine`], and only through it can the state be [saved](PausedMachine::save) or
//! [replaced](PausedMachine::restore): dropping it resumes what ran before.
//!
//! A `Machine` is shared by threads (`Arc<Machine>`): its methods take `&self`, and a control
//! socket may ask for the state while a migration pauses.
//!
//! # Lock order
//!
//! 1. the run control's state (`control`): held for moments, and while waiting on its condition
//!    variable. Never taken by a thread that holds one of the others.
//! 2. a vCPU: held by its thread all the while it runs, by savers while it is parked.
//! 3. a device: held during one access.
//!
//! 4. a virtio device's own locks: taken by its worker, by 1 when the machine pauses and resumes,
//!    and under 3.
//!
//! The virtio devices rest whenever the vCPUs do: they stop after the last vCPU, so that all that
//! the guest has asked for is in a queue or done, and start before the first. The disks' locks are
//! taken with the first start.
//!
//! The dirty log's lock stands alone: no other is taken under it.

mod alarm;
mod builder;
mod control;
mod cpu;
mod description;
mod devices;
mod disk_marks;
mod features;
mod fit;
mod identity;
mod load;
mod nodes;
mod paused;
mod requires;
mod run_state;
mod state;
mod throttle;
mod vmclock;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferry_devices::acpi_pm::AcpiPm;
use ferry_devices::i8042::I8042;
use ferry_devices::serial::Serial;
use ferry_devices::sync::lock;
use ferry_migration::port::{FreedPages, NotStarted};
use vmm_sys_util::eventfd::EventFd;

pub use ferry_devices::balloon::auto::Settings as BalloonAuto;

pub use crate::boot::GenerationId;
pub use builder::{BuildError, Builder};
pub use cpu::{CpuError, CpuFile, CpuModel};
pub use description::{DescriptionError, MachineDescription, UnfitHost};
pub use devices::{
    Backends, BalloonInfo, ConsoleOptions, DeviceDescription, DeviceError, DiskBacking,
    DiskOptions, MAX_DEVICES, MmioDevice, NetOptions, VsockError, VsockOptions,
};
pub use ferry_devices::net::MacAddress;
pub use fit::Misfit;
pub use identity::IdentityError;
pub use load::ApplyError;
pub use paused::{PausedMachine, RestoreMachineError, Restored, SaveError};
pub use run_state::{ChangeError, Exit, PauseError, ResumeError, RunState};
pub use state::{
    DevicesState, MachineState, OLDEST_STATE_VERSION, STATE_VERSION, StateError, version_for,
};
pub use vmclock::{Disruption, DisruptionError, VmClock};

use crate::kvm::{DirtyLog, IrqLine, Vcpu, Vm};
use crate::memory::GuestRam;
use control::Control;
use devices::VirtioSet;

/// A virtual machine. See the [module](self) for its life.
#[derive(Debug)]
pub struct Machine {
    control: Arc<Control>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    devices: Devices,
    virtio: Arc<VirtioSet>,
    /// Keeps the socket's file, which threads of the devices may not remove.
    vsock: Option<VsockOptions>,
    disk_marks: disk_marks::DiskMarks,
    /// Memory of a guest that has left, which is not here any more.
    freed: Mutex<FreedPages>,
    dirty_log: DirtyLog,
    vm: Arc<Vm>,
    description: MachineDescription,
}

/// The devices of the machine's own, beside those that sit in the kernel.
struct Devices {
    serial: Arc<Mutex<Serial>>,
    serial_irq: IrqLine,
    i8042: Arc<Mutex<I8042>>,
    acpi_pm: Arc<Mutex<AcpiPm>>,
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Devices")
    }
}

impl Machine {
    /// Starts to describe a machine.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// What has to be known to build the same machine elsewhere.
    #[must_use]
    pub fn description(&self) -> &MachineDescription {
        &self.description
    }

    /// The guest's RAM.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.vm.ram()
    }

    /// What of the RAM was given back to this host after the guest had left.
    pub(crate) const fn freed(&self) -> &Mutex<FreedPages> {
        &self.freed
    }

    /// The log of pages that the guest and the VMM dirty.
    #[must_use]
    pub fn dirty_log(&self) -> &DirtyLog {
        &self.dirty_log
    }

    /// The VM underneath.
    #[must_use]
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// The description for a host that the guest is to go to: it says which files are behind the
    /// disks here.
    #[must_use]
    pub fn description_to_send(&self) -> MachineDescription {
        MachineDescription {
            devices: devices::with_backing(&self.description.devices, self.virtio.disks()),
            ..self.description.clone()
        }
    }

    /// Frequency of the guest's TSC in kHz, where the host tells.
    #[must_use]
    pub fn tsc_khz(&self) -> Option<u32> {
        self.description.tsc_khz
    }

    /// What the machine is doing.
    #[must_use]
    pub fn run_state(&self) -> RunState {
        self.control.run_state()
    }

    /// Lets the vCPUs run. No effect when they do. Waits for a [`PausedMachine`] that another
    /// thread holds.
    ///
    /// # Errors
    /// [`ResumeError::Ended`], and [`ResumeError::Committed`] for a guest that was [handed
    /// over](PausedMachine::commit).
    pub fn resume(&self) -> Result<(), ResumeError> {
        self.control.resume()
    }

    /// Stops all vCPUs, in parallel, each at the end of an instruction with no device access
    /// pending. When this returns, no guest code runs and none will until the guard is dropped or
    /// used up.
    ///
    /// One guard exists at a time: a second caller waits for the first (so a thread that holds one
    /// must not ask for another).
    ///
    /// # Errors
    /// [`PauseError`]; what ran goes on running.
    pub fn pause(&self) -> Result<PausedMachine<'_>, PauseError> {
        let was_running = self.control.pause()?;
        Ok(PausedMachine::new(self, was_running))
    }

    /// From now on each vCPU rests this share of its time, up to 0.99; those that the list leaves
    /// out run at full speed. A rest ends at once for a pause or an end.
    ///
    /// # Errors
    /// No thread can be started; all run at full speed.
    pub fn slow_vcpus(&self, shares: &[f64]) -> std::io::Result<()> {
        self.control.throttle().slow(shares)
    }

    /// How long each vCPU has rested so far.
    #[must_use]
    pub fn vcpus_rested(&self) -> Vec<std::time::Duration> {
        self.control.throttle().rested()
    }

    /// Ends the machine for good. Its memory and its state stay until it is dropped.
    pub fn stop(&self) {
        self.control.end(Exit::Stopped);
    }

    /// Ends the machine as [`stop`](Self::stop) does, because it cannot go on: `why` is the
    /// sentence that says so.
    pub fn fail(&self, why: String) {
        self.control.end(Exit::Failure(why));
    }

    /// Why the machine ended, if it has.
    #[must_use]
    pub fn exit_reason(&self) -> Option<Exit> {
        self.control.exit_reason()
    }

    /// Waits until the machine has ended.
    #[must_use]
    pub fn wait(&self) -> Exit {
        self.control.wait()
    }

    /// Waits for at most `timeout` until the machine has ended.
    #[must_use]
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Exit> {
        self.control.wait_timeout(timeout)
    }

    /// Becomes readable when the machine ends: for an event loop.
    #[must_use]
    pub fn exit_event(&self) -> &EventFd {
        self.control.exit_event()
    }

    /// When the last of the vCPUs had left guest code in the latest pause: from then on the guest
    /// stood still. `None` before the first.
    #[must_use]
    pub fn last_paused_at(&self) -> Option<Instant> {
        self.control.last_paused_at()
    }

    /// When the first of the vCPUs entered KVM_RUN after the latest resume; `None` while none has.
    #[must_use]
    pub fn first_entry_at(&self) -> Option<Instant> {
        self.control.entries().into_iter().flatten().min()
    }

    /// When each vCPU entered KVM_RUN for the first time after the latest resume.
    #[must_use]
    pub fn entries(&self) -> Vec<Option<Instant>> {
        self.control.entries()
    }

    /// [`first_entry_at`](Self::first_entry_at), waiting for at most `timeout`: a thread that was
    /// woken needs some microseconds to get there.
    #[must_use]
    pub fn wait_first_entry(&self, timeout: Duration) -> Option<Instant> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(at) = self.first_entry_at() {
                return Some(at);
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Where the virtio devices are: what a guest has to be told of them.
    #[must_use]
    pub fn mmio_devices(&self) -> Vec<MmioDevice> {
        (0..self.virtio.len()).filter_map(devices::place).collect()
    }

    /// Flushes and unlocks the disks: the guest goes on elsewhere. To be called while
    /// it is paused; a resume takes the locks again, or fails.
    ///
    /// # Errors
    /// [`DeviceError::Disk`]; some locks may be held still.
    pub fn release_disks(&self) -> Result<(), DeviceError> {
        self.virtio.release_disks()
    }

    /// Notes the disks as they are, with the state of the paused guest: for
    /// [`check_disks`](Self::check_disks).
    pub fn note_disks(&self) {
        self.disk_marks.note(self.virtio.disks());
    }

    /// Whether the guest, whose state is that of the last [`note_disks`](Self::note_disks), fits
    /// its disks still: another host may have run it on them meanwhile.
    ///
    /// # Errors
    /// They were written, or nothing tells (a block device); a sentence.
    pub fn check_disks(&self) -> Result<(), String> {
        self.disk_marks.check()
    }

    /// Takes back a guest that was [handed over](PausedMachine::commit), on the destination's word
    /// that it did not start it and never will: it does again what it did before.
    ///
    /// # Errors
    /// [`ResumeError::NotCommitted`], or why it cannot go on: it is then here, and paused.
    pub fn take_back(&self, _: &NotStarted) -> Result<(), ResumeError> {
        self.control.take_back()
    }

    /// Lets a guest that was [handed over](PausedMachine::commit) run here, on an operator's word
    /// that it runs nowhere else. If it does, there are two of it.
    ///
    /// # Errors
    /// [`ResumeError::NotCommitted`], [`ResumeError::Asked`] while a migration or
    /// [`recover`](crate::migrate::recover) is under way, or why it cannot run: nothing is changed
    /// then.
    pub fn take_over(&self) -> Result<(), ResumeError> {
        self.control.take_over()
    }

    /// Books that the destination is asked about the guest that was given to it: until
    /// [`end_asking`](Self::end_asking) it cannot be taken over. `false` when it was not given
    /// away, or is being asked about already.
    pub(crate) fn begin_asking(&self) -> bool {
        self.control.begin_asking()
    }

    pub(crate) fn end_asking(&self) {
        self.control.end_asking();
    }

    /// Asks the guest to keep `bytes` of its memory unused, so that the host can have them; it
    /// gives them as it can, and the size is not moved automatically any more. `false` when it has
    /// no balloon. Waits while a [`PausedMachine`] exists.
    ///
    /// # Errors
    /// [`ChangeError`]: the guest is not here any more, or its state is being read.
    pub fn set_balloon(&self, bytes: u64) -> Result<bool, ChangeError> {
        self.control.change(|| self.virtio.set_balloon(bytes))
    }

    /// From now on the balloon takes what the guest does not use (dynamic self-ballooning), here
    /// and wherever the guest goes. `false` when it has no balloon. Waits while a [`PausedMachine`]
    /// exists.
    ///
    /// # Errors
    /// [`ChangeError`]: the guest is not here any more, or its state is being read.
    pub fn set_balloon_auto(&self, settings: BalloonAuto) -> Result<bool, ChangeError> {
        self.control
            .change(|| self.virtio.set_balloon_auto(settings))
    }

    /// What the balloon holds and what the guest last said of its memory, if it has a balloon. Asks
    /// it for newer figures.
    #[must_use]
    pub fn balloon(&self) -> Option<BalloonInfo> {
        self.virtio.balloon()
    }

    /// Whether the guest has a balloon.
    #[must_use]
    pub fn has_balloon(&self) -> bool {
        self.virtio.has_balloon()
    }

    /// While `true`, memory that the guest gives back stays where it is: for a guest whose pages
    /// have not all arrived, and of which a page without contents would be fetched again.
    pub fn keep_free_pages(&self, keep: bool) {
        self.virtio.keep_free_pages(keep);
    }

    /// Closes the connections between the guest and programs of this host: the guest goes on
    /// elsewhere. To be called while it is paused; if it goes on here it is told.
    pub fn close_connections(&self) {
        self.virtio.close_connections();
    }

    /// The socket behind its vsock device, if it has one.
    #[must_use]
    pub fn vsock(&self) -> Option<&std::path::Path> {
        self.vsock.as_ref().map(VsockOptions::path)
    }

    /// The disks, in order: for copying them.
    #[must_use]
    pub fn disks(&self) -> &[Arc<ferry_devices::block::Disk>] {
        self.virtio.disks()
    }

    /// Whether the guest has network cards.
    #[must_use]
    pub fn has_taps(&self) -> bool {
        !self.virtio.taps().is_empty()
    }

    /// The taps behind the network cards, in order, for a machine in another process that goes on
    /// with this guest. While this one runs only this one may use them.
    ///
    /// # Errors
    /// Out of file descriptors.
    pub fn share_taps(&self) -> std::io::Result<Vec<OwnedFd>> {
        self.virtio.taps().iter().map(OwnedFd::try_clone).collect()
    }

    /// Gives the guest's serial port bytes to receive; returns how many it took. While the machine
    /// is paused it takes none: they would be missing from a state that is being saved.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        // The port first: a pause that comes now reads its state after this.
        let mut serial = lock(&self.devices.serial);
        if self.run_state() != RunState::Running {
            return 0;
        }
        serial.input(bytes)
    }

    /// Gives the guest's console bytes to read; returns how many it took. It takes none while the
    /// machine is paused, and a console that is at work may take none at this moment.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.virtio.console_input(bytes)
    }

    /// Says how large the console's terminal is. Whether the console took it: a machine that has no
    /// console, is paused, or whose console is at work does not.
    pub fn set_console_size(&self, columns: u16, rows: u16) -> bool {
        self.virtio.set_console_size(columns, rows)
    }

    /// Whether the guest has a console.
    #[must_use]
    pub fn has_console(&self) -> bool {
        self.virtio.has_console()
    }

    /// Bytes that the guest sent to its console and its writer refused.
    #[must_use]
    pub fn console_output_lost(&self) -> u64 {
        self.virtio.console_output_lost()
    }

    /// Presses the machine's power button. A guest with ACPI ends in its own time; one without does
    /// not notice.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    pub fn press_power_button(&self) -> std::io::Result<()> {
        lock(&self.devices.acpi_pm).press_power_button()
    }

    /// Bytes that the guest sent to the serial port and its writer refused.
    #[must_use]
    pub fn serial_output_lost(&self) -> u64 {
        lock(&self.devices.serial).lost_output()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.control.end(Exit::Stopped);
        for thread in lock(&self.threads).drain(..) {
            // One that panicked has ended the machine with a sentence.
            let _ = thread.join();
        }
    }
}
