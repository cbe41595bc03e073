//! Ports, the time-stamp counter, exception gates, further processors, the end.

use core::arch::asm;
use core::arch::x86_64::_rdtsc;
use core::mem::size_of;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use ferry_nas::workload::BYTES_PER_CPU;

/// The most processors: `boot.s` has that many TSS descriptors and stack slots.
pub const MAX_CPUS: usize = 64;

/// Reads a byte from a port.
#[inline]
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: IOPL is 3; reading a port touches no memory of this program.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    };
    value
}

/// Writes a byte to a port.
#[inline]
pub fn outb(port: u16, value: u8) {
    // SAFETY: IOPL is 3; the ports used here (COM1, PIT, keyboard controller) do not write to
    // memory.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    };
}

/// The time-stamp counter.
#[inline(always)]
pub fn tsc() -> u64 {
    // SAFETY: CR4.TSD is clear, so ring 3 may read it.
    unsafe { _rdtsc() }
}

/// The counter's rate in kHz, measured against some 30 ms of the interval timer; `None` if there is
/// none.
///
/// Channel 2 through its output at port 0x61 is what a PC's software uses, but small machines leave
/// that port out. Channel 0 needs no gate. One countdown without repetition: the interrupt at its
/// end is masked, and there is no second one to disturb what the guest measures later.
pub fn measure_tsc_khz() -> Option<u64> {
    const TIMER_HZ: u64 = 1_193_182;
    const TICKS: u16 = 35_795;
    outb(0x43, 0x30);
    outb(0x40, 0xff);
    outb(0x40, 0xff);
    let count = || {
        outb(0x43, 0);
        let at = tsc();
        (u16::from_le_bytes([inb(0x40), inb(0x40)]), at)
    };
    let begin = tsc();
    // The first readings are slow, as code and paths are cold.
    let (mut first, mut start) = count();
    while first > 0xf000 {
        (first, start) = count();
        // Many times what it takes, on any processor: nothing counts there.
        if start.wrapping_sub(begin) > 1 << 31 {
            return None;
        }
    }
    loop {
        let (now, end) = count();
        let passed = first.wrapping_sub(now);
        if passed >= TICKS {
            let khz = (end - start) * TIMER_HZ / u64::from(passed) / 1000;
            return (100_000..100_000_000).contains(&khz).then_some(khz);
        }
        if end.wrapping_sub(begin) > 1 << 31 {
            return None;
        }
    }
}

/// A gate or descriptor of 16 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor(u64, u64);

unsafe extern "C" {
    static mut idt: [Descriptor; 32];
    static mut gdt: [u64; 135];
    static mut ap_stacks: [u64; MAX_CPUS];
    static ap_next: AtomicU32;
    static ap_count: AtomicU32;
    static stubs: u8;
    static trampoline: u8;
    static trampoline_end: u8;
    fn service_call();
}

/// Points every exception at its stub. Done from ring 3, where writing memory is fast; the
/// processor already knows where the table lies.
pub fn install_exception_gates() {
    for vector in 0..32usize {
        let stub = (&raw const stubs).addr() as u64 + vector as u64 * 16;
        // Present, ring 0, interrupt gate, ring 0 code.
        let low = stub & 0xffff | 0x08 << 16 | 0x8e00 << 32 | (stub & 0xffff_0000) << 32;
        // SAFETY: within the table, which only this function writes, before any other processor
        // runs.
        unsafe {
            (&raw mut idt)
                .cast::<Descriptor>()
                .add(vector)
                .write_volatile(Descriptor(low, stub >> 32))
        };
    }
}

/// Asks ring 0: see `service_call` in `boot.s`.
fn service(what: u32, msr: u32, value: u32) {
    // SAFETY: the call is answered by the exception handler, which changes no memory but its own
    // stack; it clobbers what is listed. Writing APIC registers is all it is used for.
    unsafe {
        asm!("call {}", sym service_call, inout("esi") what => _, inout("ecx") msr => _, inout("eax") value => _,
            inout("edx") 0 => _, out("edi") _);
    }
}

fn wait_us(us: u64, tsc_khz: u64) {
    let start = tsc();
    while tsc().wrapping_sub(start) < us * tsc_khz / 1000 {
        core::hint::spin_loop();
    }
}

const RING0_BYTES: usize = 4096;
/// As in `boot.s`: the TSS proper, a bit for each port below 0x400, and the byte that ends them.
const TSS_LIMIT: u64 = 104 + 0x400 / 8;

/// Starts `count` further processors; each runs `team::serve`. Returns how many came up within
/// three seconds.
///
/// `memory` is what they live in from now on, [`BYTES_PER_CPU`] each: its TSS, its ring 0 stack,
/// its own stack.
pub fn start_others(
    count: usize,
    memory: &'static mut [u8],
    tsc_khz: u64,
    ready: &AtomicU64,
) -> usize {
    const INIT: u32 = 0xc_4500;
    const START_AT_0X8000: u32 = 0xc_4608;
    const APIC_BASE: u32 = 0x1b;
    const X2APIC_ENABLE: u32 = 0xc00;
    const X2APIC_ICR: u32 = 0x830;
    let count = count.min(MAX_CPUS - 1).min(memory.len() / BYTES_PER_CPU);
    for (i, memory) in memory
        .chunks_exact_mut(BYTES_PER_CPU)
        .take(count)
        .enumerate()
    {
        let bottom = memory.as_mut_ptr().addr() as u64;
        // A TSS that says two things: the stack for ring 0, and that ports below 0x400 are free to
        // use.
        memory.fill(0);
        if let Some(field) = memory.get_mut(4..12) {
            field.copy_from_slice(&(bottom + RING0_BYTES as u64).to_le_bytes());
        }
        if let Some([low, high]) = memory.get_mut(102..104) {
            [*low, *high] = 104u16.to_le_bytes();
        }
        if let Some(end) = memory.get_mut(104 + 0x400 / 8) {
            *end = 0xff;
        }
        let low = TSS_LIMIT | (bottom & 0xff_ffff) << 16 | 0x89 << 40 | (bottom >> 24 & 0xff) << 56;
        // SAFETY: the tables are written before the processors that read them are started, and only
        // here.
        unsafe {
            let entry = (&raw mut gdt).cast::<u64>().add(7 + 2 * (i + 1));
            entry.write_volatile(low);
            entry.add(1).write_volatile(bottom >> 32);
            (&raw mut ap_stacks)
                .cast::<u64>()
                .add(i)
                .write_volatile(bottom + BYTES_PER_CPU as u64);
        }
    }
    // SAFETY: a plain atomic of `boot.s`.
    unsafe { &ap_count }.store(u32::try_from(count).unwrap_or(0), Ordering::SeqCst);
    // SAFETY: as above.
    unsafe { &ap_next }.store(0, Ordering::SeqCst);
    let (from, to) = (&raw const trampoline, &raw const trampoline_end);
    let destination = core::ptr::with_exposed_provenance_mut::<u8>(0x8000);
    // SAFETY: the trampoline is less than a page of code; 0x8000 is memory below the image that
    // nothing uses (the start information was read before), mapped one to one.
    unsafe { destination.copy_from_nonoverlapping(from, to.addr() - from.addr()) };

    service(2, APIC_BASE, X2APIC_ENABLE);
    service(1, X2APIC_ICR, INIT);
    wait_us(10_000, tsc_khz);
    service(1, X2APIC_ICR, START_AT_0X8000);
    // A second start is customary for those that missed the first, and ignored by processors that
    // run.
    if !arrived(count, 200_000, tsc_khz, ready) {
        service(1, X2APIC_ICR, START_AT_0X8000);
        arrived(count, 3_000_000, tsc_khz, ready);
    }
    usize::try_from(ready.load(Ordering::Acquire)).unwrap_or(0)
}

/// Waits until `count` processors are here, `us` microseconds at most; returns whether they are.
fn arrived(count: usize, us: u64, tsc_khz: u64, ready: &AtomicU64) -> bool {
    let start = tsc();
    while ready.load(Ordering::Acquire) < count as u64 {
        if tsc().wrapping_sub(start) > us * tsc_khz / 1000 {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// Ends the machine: by the keyboard controller's reset line where there is one, else by a triple
/// fault.
pub fn shut_down() -> ! {
    outb(0x64, 0xfe);
    service(0, 0, 0);
    loop {
        core::hint::spin_loop();
    }
}

const _: () = assert!(size_of::<Descriptor>() == 16);
