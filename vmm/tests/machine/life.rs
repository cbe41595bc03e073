//! Running, pausing, ending.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_migration::options::Options;
use ferry_migration::report::Status;
use ferry_vmm::machine::{BuildError, Exit, Machine, PauseError, ResumeError, RunState};
use ferry_vmm::migrate::{Handle, Uri, recover};

use crate::support::{COUNT, COUNTER, MIB, ends, image, kvm, machine, progresses, read};

#[test]
fn a_paused_guest_makes_no_progress_and_a_resumed_one_does() {
    if !kvm() {
        return;
    }
    let m = machine(Machine::builder(), &COUNT);
    assert_eq!(m.run_state(), RunState::Paused);
    assert_eq!(m.last_paused_at(), None);
    m.resume().unwrap();
    m.resume().unwrap();
    assert_eq!(m.run_state(), RunState::Running);
    progresses(&m, COUNTER);
    for _ in 0..20 {
        let asked = Instant::now();
        let paused = m.pause().unwrap();
        assert!(paused.was_running());
        let at = m.last_paused_at().unwrap();
        assert!(at >= asked && at <= Instant::now());
        let count = read(&m, COUNTER);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(read(&m, COUNTER), count);
        assert_eq!(m.run_state(), RunState::Paused);
        drop(paused);
        assert!(m.wait_first_entry(Duration::from_secs(60)).unwrap() > at);
        progresses(&m, COUNTER);
    }
    m.pause().unwrap().keep_paused();
    let count = read(&m, COUNTER);
    let paused = m.pause().unwrap();
    assert!(!paused.was_running());
    drop(paused);
    std::thread::sleep(Duration::from_millis(2));
    assert_eq!(read(&m, COUNTER), count, "what did not run is not resumed");
    m.pause().unwrap().resume().unwrap();
    progresses(&m, COUNTER);
}

#[test]
fn a_second_pause_waits_for_the_first_and_a_stop_does_not() {
    if !kvm() {
        return;
    }
    let m = Arc::new(machine(Machine::builder(), &COUNT));
    m.resume().unwrap();
    progresses(&m, COUNTER);
    let first = m.pause().unwrap();
    let second = {
        let m = m.clone();
        std::thread::spawn(move || m.pause().map(|p| p.was_running()))
    };
    std::thread::sleep(Duration::from_millis(5));
    assert!(!second.is_finished());
    assert_eq!(
        m.run_state(),
        RunState::Paused,
        "status is answered meanwhile"
    );
    drop(first);
    assert_eq!(second.join().unwrap(), Ok(true));
    let paused = m.pause().unwrap();
    m.stop();
    paused.save().unwrap();
    assert_eq!(paused.resume(), Err(ResumeError::Ended(Exit::Stopped)));
    assert!(matches!(m.pause(), Err(PauseError::Ended(Exit::Stopped))));
    assert_eq!(m.exit_event().read().unwrap(), 1);
}

#[test]
fn a_guest_that_was_handed_over_runs_on_a_word_alone() {
    if !kvm() {
        return;
    }
    let m = machine(Machine::builder(), &COUNT);
    m.resume().unwrap();
    progresses(&m, COUNTER);
    assert_eq!(m.take_over(), Err(ResumeError::NotCommitted));
    m.pause().unwrap().commit();
    assert_eq!(m.run_state(), RunState::Committed);
    assert_eq!(m.resume(), Err(ResumeError::Committed));
    assert_eq!(m.pause().err(), Some(PauseError::Committed));
    let count = read(&m, COUNTER);
    std::thread::sleep(Duration::from_millis(2));
    assert_eq!(read(&m, COUNTER), count);
    m.take_over().unwrap();
    progresses(&m, COUNTER);
    assert_eq!(m.take_over(), Err(ResumeError::NotCommitted));
    m.pause().unwrap().commit();
    m.stop();
    assert_eq!(m.take_over(), Err(ResumeError::Ended(Exit::Stopped)));
}

/// What an embedder asks for by mistake: there is no commit to repeat.
#[test]
fn a_guest_that_is_here_is_not_recovered() {
    if !kvm() {
        return;
    }
    let m = Arc::new(machine(Machine::builder(), &COUNT));
    m.resume().unwrap();
    let to: Uri = "tcp:127.0.0.1:9".parse().unwrap();
    let (session, options) = ("00".repeat(16), Options::default());
    let report = recover(&m, to, &session, &options, &Handle::in_doubt(), &mut |_| {});
    assert_eq!(report.status, Status::Failed, "{report:#?}");
    assert!(report.error.unwrap().contains("not handed over"));
    progresses(&m, COUNTER);
}

#[test]
fn a_triple_fault_ends_the_machine() {
    if !kvm() {
        return;
    }
    // ud2, and there is no IDT.
    let m = machine(Machine::builder(), &[0x0f, 0x0b]);
    m.resume().unwrap();
    assert_eq!(ends(&m), Exit::TripleFault);
    assert_eq!(m.run_state(), RunState::Ended(Exit::TripleFault));
    assert_eq!(m.resume(), Err(ResumeError::Ended(Exit::TripleFault)));
}

#[test]
fn the_keyboard_controller_resets_the_machine() {
    if !kvm() {
        return;
    }
    // mov al, 0xfe; out 0x64, al; jmp .
    let m = machine(Machine::builder(), &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe]);
    m.resume().unwrap();
    assert_eq!(ends(&m), Exit::Reset);
}

/// A device whose handler panics, on the vCPU's own thread.
struct Defect;

impl std::io::Write for Defect {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        panic!("a defect")
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_panic_of_a_vcpus_thread_ends_the_machine_with_a_sentence() {
    if !kvm() {
        return;
    }
    // mov dx, 0x3f8; out dx, al; jmp .
    let code = [0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfe];
    let m = machine(Machine::builder().cpus(2).serial(Box::new(Defect)), &code);
    m.resume().unwrap();
    let Exit::Failure(why) = ends(&m) else {
        panic!("{:?}", m.exit_reason());
    };
    assert!(why.contains("vcpu0 panicked (a defect)"), "{why}");
    // Nothing waits for the thread: not a pause, and not the end of the machine.
    assert!(matches!(m.pause(), Err(PauseError::Ended(_))));
    drop(m);
}

#[test]
fn impossible_machines_are_refused() {
    if !kvm() {
        return;
    }
    for (memory, cpus) in [(0, 1), (MIB + 1, 1), (MIB, 0), (MIB, 255)] {
        let error = Machine::builder()
            .memory(memory)
            .cpus(cpus)
            .build()
            .unwrap_err();
        assert!(
            matches!(error, BuildError::Ram(_) | BuildError::Cpus { .. }),
            "{error}"
        );
    }
}

#[test]
fn writes_outside_of_memory_are_refused() {
    if !kvm() {
        return;
    }
    let m = Machine::builder().memory(MIB).build().unwrap();
    // The program belongs at 1 MiB, where this machine's memory ends.
    assert!(
        m.apply(&image(&[], &COUNT))
            .unwrap_err()
            .to_string()
            .contains("0x100000")
    );
}

/// Prints how long a pause takes; asserts nothing about it.
#[test]
fn pause_latency() {
    if !kvm() {
        return;
    }
    for cpus in [1, 2] {
        let m = machine(Machine::builder().cpus(cpus), &COUNT);
        m.resume().unwrap();
        progresses(&m, COUNTER);
        let mut pause = Vec::new();
        let mut resume = Vec::new();
        let mut save = Vec::new();
        for _ in 0..200 {
            std::thread::sleep(Duration::from_micros(300));
            let asked = Instant::now();
            let paused = m.pause().unwrap();
            pause.push(asked.elapsed());
            let before = Instant::now();
            let state = paused.save().unwrap();
            save.push(before.elapsed());
            drop(state);
            let asked = Instant::now();
            drop(paused);
            resume.push(m.wait_first_entry(Duration::from_secs(60)).unwrap() - asked);
        }
        for (what, mut times) in [("pause", pause), ("save", save), ("resume", resume)] {
            times.sort_unstable();
            println!(
                "{cpus} vCPU: {what} p50 {:?} p99 {:?} max {:?}",
                times[100], times[198], times[199]
            );
        }
    }
}
