//! The bare guest: a PVH image that sets itself up in ring 0, drops to ring 3 and runs a workload
//! there.
//!
//! Ring 3 because some KVMs run it natively where they emulate ring 0; with IOPL 3 and every page
//! mapped for the user, ring 3 needs nothing else. The three ring 0 services left (write an MSR, or
//! bits into one, shut down) are in `boot.s`. See `guest-images/README.md` for the command line and
//! the lines it prints.
#![no_std]
#![no_main]
// Errors carry their text with them, there being no allocator; they are made once, right before the
// end.
#![allow(clippy::result_large_err)]

mod console;
mod cpu;
mod guest;
mod memory;
mod monitor;
mod runtime;
mod start_info;
mod team;

use ferry_nas::line::Line;

core::arch::global_asm!(include_str!("boot.s"));

/// The boot processor, in ring 3.
#[unsafe(no_mangle)]
extern "C" fn rust_main(start_info: u64) -> ! {
    cpu::install_exception_gates();
    console::init();
    if let Err(error) = guest::run(start_info) {
        console::print(&Line::Error(&console::Text::new(format_args!("{error}"))));
    }
    console::print(&Line::End);
    cpu::shut_down()
}

/// A further processor, in ring 3.
#[unsafe(no_mangle)]
extern "C" fn rust_ap(rank: usize) -> ! {
    team::serve(rank)
}

/// An exception that nothing handles, reported from ring 3.
#[unsafe(no_mangle)]
extern "C" fn rust_fault(vector: u64, rip: u64, code: u64, address: u64) -> ! {
    console::print(&Line::Fault {
        vector,
        rip,
        code,
        address,
    });
    cpu::shut_down()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    console::print(&Line::Error(&console::Text::new(format_args!(
        "the guest found a mistake of its own: {info}"
    ))));
    cpu::shut_down()
}
