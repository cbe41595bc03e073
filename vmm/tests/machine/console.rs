//! A virtio console in a machine whose guest has no driver for it: what is typed waits, and moves.

use std::io;

use ferry_vmm::machine::{Backends, ConsoleOptions, Machine};

use crate::support::{COUNT, COUNTER, eventually, kvm, machine, progresses};

fn console() -> Backends {
    let nowhere = || Ok(Box::new(io::sink()) as Box<dyn io::Write + Send>);
    Backends {
        console: Some(ConsoleOptions::new(nowhere)),
        ..Backends::default()
    }
}

#[test]
fn what_was_typed_before_a_move_is_in_the_state_and_nothing_is_taken_in_a_pause() {
    if !kvm() {
        return;
    }
    let source = machine(Machine::builder().devices(console()), &COUNT);
    assert!(source.has_console());
    assert_eq!(source.console_input(b"early"), 0, "it does not run yet");
    assert!(!source.set_console_size(80, 25));
    source.resume().unwrap();
    // A console that is at work takes nothing at that moment.
    eventually("it is taken", &source, || {
        source.console_input(b"typed in flight") == 15
    });
    eventually("the size is heard", &source, || {
        source.set_console_size(132, 43)
    });
    let paused = source.pause().unwrap();
    assert_eq!(source.console_input(b"late"), 0);
    let state = paused.save().unwrap();
    let bytes = state.to_bytes().unwrap();
    let typed = |bytes: &[u8]| bytes.windows(15).any(|part| part == b"typed in flight");
    assert!(typed(&bytes));
    // A ferry from before there was a console is told so by name.
    let error = state.to_bytes_as(3).unwrap_err().to_string();
    assert!(error.contains("no console"), "{error}");

    // Without a place for it the guest keeps its console.
    let next = |backends| {
        Machine::builder()
            .from_description(source.description())
            .devices(backends)
            .build()
    };
    for backends in [console(), Backends::default()] {
        let next = next(backends).unwrap();
        let restored = next.pause().unwrap();
        restored.restore(&state).unwrap();
        assert!(typed(&restored.save().unwrap().to_bytes().unwrap()));
        assert!(next.has_console());
    }
    drop(paused);
    progresses(&source, COUNTER);
}

#[test]
fn a_guest_without_one_takes_none() {
    if !kvm() {
        return;
    }
    let source = machine(Machine::builder(), &COUNT);
    assert_eq!(source.console_input(b"x"), 0);
    let next = Machine::builder()
        .from_description(source.description())
        .devices(console())
        .build();
    let error = next.unwrap_err().to_string();
    assert!(error.contains("leave --console out"), "{error}");
}
