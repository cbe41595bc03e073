//! COM1, polled.

use crate::cpu::{inb, outb};
use crate::monitor;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

const DATA: u16 = 0x3f8;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_CONTROL: u16 = DATA + 3;
const LINE_STATUS: u16 = DATA + 5;
const FIFO_BYTES: u32 = 16;

/// 115200 8N1, FIFO on, no interrupts.
pub fn init() {
    outb(DATA + 1, 0);
    outb(LINE_CONTROL, 0x80);
    outb(DATA, 1);
    outb(DATA + 1, 0);
    outb(LINE_CONTROL, 3);
    outb(FIFO_CONTROL, 7);
    outb(DATA + 4, 3);
}

/// The byte that came in, if one did.
pub fn receive() -> Option<u8> {
    (inb(LINE_STATUS) & 1 != 0).then(|| inb(DATA))
}

struct Port {
    /// Bytes the FIFO has room for.
    room: u32,
}

impl Write for Port {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while self.room == 0 {
                monitor::tick_here();
                if inb(LINE_STATUS) & 0x20 != 0 {
                    self.room = FIFO_BYTES;
                }
            }
            self.room -= 1;
            outb(DATA, byte);
            // Printing is slow, each byte being an exit: watched byte by byte, it cannot hide a
            // pause.
            monitor::tick_here();
        }
        Ok(())
    }
}

/// What readers of lines skip.
const BEAT: u8 = 0;

static BUSY: AtomicBool = AtomicBool::new(false);

/// Prints one line; lines of several processors do not mix.
pub fn print(line: &impl fmt::Display) {
    while BUSY.swap(true, Ordering::Acquire) {
        monitor::tick_here();
        core::hint::spin_loop();
    }
    // `Port` never fails.
    let _ = writeln!(Port { room: 0 }, "{line}");
    BUSY.store(false, Ordering::Release);
}

/// Sends one byte that is no text, a sign of life for those who listen outside. Leaves it out while
/// a line is printed, which is one as well, or while the port is busy.
pub fn beat() {
    if BUSY.swap(true, Ordering::Acquire) {
        return;
    }
    if inb(LINE_STATUS) & 0x20 != 0 {
        outb(DATA, BEAT);
    }
    BUSY.store(false, Ordering::Release);
}

/// Formatted text of bounded length, for messages; what does not fit is cut.
pub struct Text {
    bytes: [u8; 400],
    len: usize,
}

impl Text {
    /// Formats `text`.
    pub fn new(text: fmt::Arguments<'_>) -> Self {
        let mut new = Self {
            bytes: [0; 400],
            len: 0,
        };
        let _ = new.write_fmt(text);
        new
    }
}

impl core::ops::Deref for Text {
    type Target = str;
    fn deref(&self) -> &str {
        self.bytes
            .get(..self.len)
            .and_then(|bytes| str::from_utf8(bytes).ok())
            .unwrap_or("")
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            // One line per message, whatever a message contains.
            let c = if c.is_control() { ' ' } else { c };
            let end = self.len + c.len_utf8();
            let Some(room) = self.bytes.get_mut(self.len..end) else {
                return Ok(());
            };
            c.encode_utf8(room);
            self.len = end;
        }
        Ok(())
    }
}
