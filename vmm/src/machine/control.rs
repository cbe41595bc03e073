//! Running and stopping the vCPU threads.
//!
//! A pause is: say that vCPUs shall stop, kick them all, wait until all are parked. A vCPU parks
//! only after KVM_RUN has said EINTR, by which time KVM has completed any device access
//! ([`Vcpu::run`](crate::kvm::Vcpu::run)). All kicks are out before the first wait, so the vCPUs
//! stop in parallel.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ferry_devices::Trigger;
use ferry_devices::bus::Bus;
use ferry_devices::sync::{Allowance, lock, wait_timeout_while, wait_while};
use vmm_sys_util::eventfd::EventFd;

use super::devices::VirtioSet;
use super::run_state::{Exit, PauseError, ResumeError, RunState};
use super::throttle::Throttle;
use crate::kvm::{Kicker, Vcpu, VmExit};
use crate::memory::GuestRam;

mod change;

/// How long a pause waits for a vCPU. It takes microseconds; the only thing that can take long is a
/// device whose output blocks.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

/// Who may let the guest run. `Committed` is left by [`Control::reclaim`] alone: that the guest
/// never runs twice rests on it.
///
/// ```text
///  Running ─pause─▶ Paused ─commit─▶ Committed ─end─▶ Ended
///     ◀─resume, drop─┘  ◀───reclaim──┘
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Paused,
    Running,
    Committed {
        /// It ran before the pause in which it was handed over.
        ran: bool,
        /// COMMIT is being said to the destination, which may start the guest at any moment.
        asked: bool,
    },
    Ended,
}

#[derive(Debug)]
struct Inner {
    mode: Mode,
    exit: Option<Exit>,
    /// A guard exists: only its holder may pause or resume.
    guarded: bool,
    /// vCPUs that are outside of KVM_RUN and will stay there while the mode is Paused.
    parked: Vec<bool>,
    paused_at: Option<Instant>,
}

/// Shared by the machine and its vCPU threads.
#[derive(Debug)]
pub(super) struct Control {
    inner: Mutex<Inner>,
    /// Something in `inner` changed.
    changed: Condvar,
    kickers: Vec<Kicker>,
    throttle: Arc<Throttle>,
    /// vCPUs shall leave at the next EINTR. Beside `inner`, so that running vCPUs need no lock.
    leave: AtomicBool,
    /// The guest has asked for its end, during the access that its vCPU is just making.
    wish: EndWish,
    exit_event: EventFd,
    /// At rest whenever the vCPUs are.
    virtio: Arc<VirtioSet>,
    /// Claimed before the vCPUs run: another process may have it too.
    ram: Arc<GuestRam>,
    /// Entry times are nanoseconds after this, plus one; 0 is none. Stored without a lock as the
    /// last thing before KVM_RUN.
    origin: Instant,
    entered: Vec<AtomicU64>,
}

impl Control {
    pub(super) fn new(
        kickers: Vec<Kicker>,
        wish: EndWish,
        exit_event: EventFd,
        virtio: Arc<VirtioSet>,
        ram: Arc<GuestRam>,
    ) -> Self {
        let inner = Inner {
            mode: Mode::Paused,
            exit: None,
            guarded: false,
            // Threads that are not started yet are not running either.
            parked: vec![true; kickers.len()],
            paused_at: None,
        };
        Self {
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            leave: AtomicBool::new(true),
            wish,
            exit_event,
            virtio,
            ram,
            origin: Instant::now(),
            throttle: Throttle::new(kickers.clone()),
            entered: kickers.iter().map(|_| AtomicU64::new(0)).collect(),
            kickers,
        }
    }

    pub(super) fn run_state(&self) -> RunState {
        let inner = self.lock();
        match (&inner.exit, inner.mode) {
            (Some(exit), _) => RunState::Ended(exit.clone()),
            (None, Mode::Running) => RunState::Running,
            (None, Mode::Committed { .. }) => RunState::Committed,
            (None, Mode::Paused | Mode::Ended) => RunState::Paused,
        }
    }

    /// Stops all vCPUs and takes the guard. Returns whether they ran.
    pub(super) fn pause(&self) -> Result<bool, PauseError> {
        let mut inner = self.wait_while(self.lock(), |i| i.guarded);
        if let Some(exit) = &inner.exit {
            return Err(PauseError::Ended(exit.clone()));
        }
        match inner.mode {
            Mode::Committed { .. } => return Err(PauseError::Committed),
            Mode::Paused => {
                inner.guarded = true;
                return Ok(false);
            }
            Mode::Running | Mode::Ended => {}
        }
        inner.guarded = true;
        inner.mode = Mode::Paused;
        self.leave.store(true, Ordering::SeqCst);
        for kicker in &self.kickers {
            kicker.kick();
        }
        self.throttle.wake();
        let mut allowance = Allowance::new(TIMEOUT);
        while inner.exit.is_none() && inner.parked.contains(&false) {
            if allowance.is_spent() {
                let stuck = inner.parked.iter().filter(|p| !**p).count();
                self.run(&mut inner);
                inner.guarded = false;
                return Err(PauseError::Stuck(stuck));
            }
            inner = allowance.wait(&self.changed, inner);
        }
        if let Some(exit) = inner.exit.clone() {
            inner.guarded = false;
            self.changed.notify_all();
            return Err(PauseError::Ended(exit));
        }
        // The guard keeps others out, so the lock need not: a disk may take its time, and the state
        // can be asked for.
        drop(inner);
        if let Err(error) = self.virtio.pause() {
            let mut inner = self.lock();
            self.virtio.resume();
            if inner.exit.is_none() {
                self.run(&mut inner);
            }
            inner.guarded = false;
            self.changed.notify_all();
            return Err(error.into());
        }
        Ok(true)
    }

    /// Gives the guard back; with `run`, the vCPUs run again.
    pub(super) fn release(&self, run: bool) -> Result<(), ResumeError> {
        let mut inner = self.lock();
        inner.guarded = false;
        self.changed.notify_all();
        if !run {
            return Ok(());
        }
        if let Some(exit) = &inner.exit {
            return Err(ResumeError::Ended(exit.clone()));
        }
        self.start(&mut inner)
    }

    pub(super) fn resume(&self) -> Result<(), ResumeError> {
        let mut inner = self.wait_while(self.lock(), |i| i.guarded);
        if let Some(exit) = &inner.exit {
            return Err(ResumeError::Ended(exit.clone()));
        }
        match inner.mode {
            Mode::Paused => self.start(&mut inner),
            Mode::Committed { .. } => Err(ResumeError::Committed),
            Mode::Running | Mode::Ended => Ok(()),
        }
    }

    /// Gives the guard back with the guest: it belongs to another machine from now on.
    pub(super) fn commit(&self, ran: bool) {
        let mut inner = self.lock();
        inner.guarded = false;
        if inner.mode == Mode::Paused {
            inner.mode = Mode::Committed { ran, asked: false };
        }
        self.changed.notify_all();
    }

    /// The guest is this machine's again: it does what it did before it was handed over.
    pub(super) fn take_back(&self) -> Result<(), ResumeError> {
        let mut inner = self.lock();
        if self.reclaim(&mut inner)? {
            self.start(&mut inner)?;
        }
        Ok(())
    }

    /// The guest runs here, whatever became of it elsewhere.
    pub(super) fn take_over(&self) -> Result<(), ResumeError> {
        let mut inner = self.lock();
        if let Mode::Committed { asked: true, .. } = inner.mode {
            return Err(ResumeError::Asked);
        }
        let ran = self.reclaim(&mut inner)?;
        let started = self.start(&mut inner);
        if started.is_err() {
            // Its memory or its disks are another's: so is the guest, then.
            inner.mode = Mode::Committed { ran, asked: false };
        }
        started
    }

    /// The one way out of `Committed`. Returns whether the guest ran before it was handed over.
    fn reclaim(&self, inner: &mut Inner) -> Result<bool, ResumeError> {
        if let Some(exit) = &inner.exit {
            return Err(ResumeError::Ended(exit.clone()));
        }
        let Mode::Committed { ran, .. } = inner.mode else {
            return Err(ResumeError::NotCommitted);
        };
        inner.mode = Mode::Paused;
        Ok(ran)
    }

    /// Sets the devices going, and then the vCPUs: the guest must not wait for a device at rest. A
    /// guest whose memory or disk another process has must not run at all.
    fn start(&self, inner: &mut Inner) -> Result<(), ResumeError> {
        let claim = self.ram.claim();
        let news = claim.map_err(|e| ResumeError::Memory(e.to_string()))?;
        if let Err(error) = self.virtio.lock_disks() {
            // It did not run, so another process may have it.
            if let (true, Err(error)) = (news, self.ram.give_up()) {
                tracing::warn!(%error, "the lock on the guest's memory stays");
            }
            return Err(ResumeError::Disk(error.to_string()));
        }
        self.ram.begin();
        self.virtio.resume();
        self.run(inner);
        self.virtio.resumed();
        Ok(())
    }

    /// Sets the vCPUs going. Kicks and releases happen under the lock, so that they cannot cross.
    fn run(&self, inner: &mut Inner) {
        for (kicker, entered) in self.kickers.iter().zip(&self.entered) {
            kicker.release();
            entered.store(0, Ordering::Relaxed);
        }
        self.leave.store(false, Ordering::SeqCst);
        inner.mode = Mode::Running;
        self.changed.notify_all();
    }

    /// Ends the machine; the first reason counts.
    pub(super) fn end(&self, exit: Exit) {
        let mut inner = self.lock();
        if inner.exit.is_some() {
            return;
        }
        inner.exit = Some(exit);
        inner.mode = Mode::Ended;
        self.leave.store(true, Ordering::SeqCst);
        for kicker in &self.kickers {
            kicker.kick();
        }
        self.throttle.release();
        self.changed.notify_all();
        drop(inner);
        // The counter of an eventfd that is written once cannot overflow.
        let _ = self.exit_event.write(1);
    }

    pub(super) fn exit_reason(&self) -> Option<Exit> {
        self.lock().exit.clone()
    }

    pub(super) fn exit_event(&self) -> &EventFd {
        &self.exit_event
    }

    pub(super) fn wait(&self) -> Exit {
        loop {
            if let Some(exit) = self.wait_timeout(Duration::from_secs(3600)) {
                return exit;
            }
        }
    }

    pub(super) fn wait_timeout(&self, timeout: Duration) -> Option<Exit> {
        wait_timeout_while(&self.changed, self.lock(), timeout, |i| i.exit.is_none())
            .exit
            .clone()
    }

    pub(super) const fn throttle(&self) -> &Arc<Throttle> {
        &self.throttle
    }

    pub(super) fn last_paused_at(&self) -> Option<Instant> {
        self.lock().paused_at
    }

    pub(super) fn entries(&self) -> Vec<Option<Instant>> {
        self.entered
            .iter()
            .map(|e| match e.load(Ordering::Acquire) {
                0 => None,
                n => Some(self.origin + Duration::from_nanos(n - 1)),
            })
            .collect()
    }

    /// The life of vCPU number `index`.
    pub(super) fn vcpu_thread(&self, index: usize, vcpu: &Mutex<Vcpu>, pio: &Bus, mmio: &Bus) {
        if let Err(error) = self.kickers[index].adopt_this_thread() {
            self.end(Exit::Failure(format!(
                "vCPU {index} cannot be made to stop: {error}"
            )));
            return;
        }
        while self.wait_for_run(index) {
            let (left_at, exit) = self.run_vcpu(index, &mut lock(vcpu), pio, mmio);
            if let Some(exit) = exit {
                self.end(exit);
            }
            let mut inner = self.lock();
            inner.parked[index] = true;
            inner.paused_at = inner.paused_at.max(Some(left_at));
            if !inner.parked.contains(&false) {
                self.changed.notify_all();
            }
        }
    }

    /// Parks until the machine runs; false when it has ended.
    fn wait_for_run(&self, index: usize) -> bool {
        let stands = |i: &Inner| matches!(i.mode, Mode::Paused | Mode::Committed { .. });
        let mut inner = self.wait_while(self.lock(), stands);
        inner.parked[index] = inner.mode == Mode::Ended;
        inner.mode == Mode::Running
    }

    /// Runs guest code until the vCPU shall leave or cannot go on. Returns when it left guest code.
    fn run_vcpu(
        &self,
        index: usize,
        vcpu: &mut Vcpu,
        pio: &Bus,
        mmio: &Bus,
    ) -> (Instant, Option<Exit>) {
        let since = self.origin.elapsed().as_nanos();
        let since = u64::try_from(since).unwrap_or(u64::MAX - 1);
        self.entered[index].store(since + 1, Ordering::Release);
        let mut ran = Instant::now();
        loop {
            let exit = match vcpu.run(pio, mmio) {
                VmExit::Handled => match self.wish.get() {
                    Some(exit) => exit,
                    None => {
                        self.throttle.rest(index, &mut ran, &self.leave);
                        continue;
                    }
                },
                VmExit::Interrupted if self.leave.load(Ordering::SeqCst) => {
                    let left_at = Instant::now();
                    vcpu.clock_was_paused();
                    return (left_at, None);
                }
                // To rest; a signal for another thread's purpose; or a kick that the last pause did
                // not need.
                VmExit::Interrupted => {
                    self.throttle.rest(index, &mut ran, &self.leave);
                    continue;
                }
                VmExit::Shutdown => Exit::Shutdown,
                VmExit::TripleFault => Exit::TripleFault,
                VmExit::Reset => Exit::Reset,
                VmExit::Failure(why) => Exit::Failure(why),
            };
            return (Instant::now(), Some(exit));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    fn wait_while<'a>(
        &self,
        inner: MutexGuard<'a, Inner>,
        condition: impl Fn(&Inner) -> bool,
    ) -> MutexGuard<'a, Inner> {
        wait_while(&self.changed, inner, |i| condition(i))
    }
}

/// How a guest has asked a device for its end, if it has. Devices are told in the middle of an
/// access, with the vCPU and the device locked, so they only leave word here: the vCPU's thread
/// looks right after the access.
#[derive(Debug, Clone, Default)]
pub(super) struct EndWish(Arc<AtomicU8>);

const RESET: u8 = 1;
const POWER_OFF: u8 = 2;

impl EndWish {
    fn get(&self) -> Option<Exit> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            RESET => Some(Exit::Reset),
            _ => Some(Exit::Shutdown),
        }
    }

    /// The reset line, as the keyboard controller has it.
    pub(super) fn reset_line(&self) -> EndLine {
        EndLine(self.clone(), RESET)
    }

    /// The power supply's switch.
    pub(super) fn power_off_line(&self) -> EndLine {
        EndLine(self.clone(), POWER_OFF)
    }
}

/// A device's way to end the machine.
pub(super) struct EndLine(EndWish, u8);

impl Trigger for EndLine {
    fn trigger(&self) -> std::io::Result<()> {
        self.0.0.store(self.1, Ordering::Relaxed);
        Ok(())
    }
}
