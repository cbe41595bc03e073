//! COM1: a 16550A around `vm-superio`'s, with an input queue behind its FIFO and a state that
//! travels.

use std::collections::VecDeque;
use std::io::Write;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{Error, NoEvents};
use vm_superio::{Serial as Uart, SerialState as UartState};

use crate::bus::BusDevice;
use crate::trigger::{SuperIo, Trigger};

/// First port of COM1.
pub const COM1_BASE: u64 = 0x3f8;
/// A 16550 has eight registers.
pub const COM1_LEN: u64 = 8;
/// The ISA interrupt line of COM1.
pub const COM1_IRQ: u32 = 4;

/// Bytes of input kept for a guest that does not read them; what comes in beyond is dropped.
pub const INPUT_LIMIT: usize = 64 * 1024;
/// Depth of the receive FIFO of `vm-superio`'s 16550.
const FIFO: usize = 64;

/// Everything of the UART that a guest can notice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// IER.
    pub interrupt_enable: u8,
    /// IIR.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// Received bytes, oldest first: the FIFO and the queue behind it.
    #[serde(with = "serde_bytes")]
    pub input: Vec<u8>,
}

/// Why a UART could not take over a state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SerialError {
    /// More input than a UART of ours can have had.
    #[error(
        "the serial port's state holds {0} bytes of input, but at most {INPUT_LIMIT} are possible: the state is damaged"
    )]
    TooMuchInput(usize),
    /// The interrupt that was pending could not be raised again.
    #[error("the serial port's pending interrupt could not be raised: {0}")]
    Interrupt(std::io::Error),
}

/// A 16550A whose output goes to a writer.
pub struct Serial {
    uart: Uart<SuperIo, NoEvents, Output>,
    /// Waits for room in the FIFO.
    queue: VecDeque<u8>,
}

impl Serial {
    /// A UART after reset. `interrupt` is poked for each interrupt (an edge); `output` gets each
    /// byte as it is sent, and is flushed after each.
    #[must_use]
    pub fn new(interrupt: Box<dyn Trigger>, output: Box<dyn Write + Send>) -> Self {
        Self {
            uart: Uart::new(
                SuperIo(interrupt),
                Output {
                    to: output,
                    lost: 0,
                },
            ),
            queue: VecDeque::new(),
        }
    }

    /// Gives the guest `bytes` to read. Returns how many were taken: the queue is bounded by
    /// [`INPUT_LIMIT`].
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let waiting = self.queue.len() + (FIFO - self.uart.fifo_capacity().min(FIFO));
        let taken = bytes.len().min(INPUT_LIMIT.saturating_sub(waiting));
        self.queue.extend(&bytes[..taken]);
        self.fill_fifo();
        taken
    }

    /// Bytes of output that the writer refused so far (a closed pipe, a full disk). The guest goes
    /// on.
    #[must_use]
    pub fn lost_output(&self) -> u64 {
        self.uart.writer().lost
    }

    /// The state to carry to another host.
    #[must_use]
    pub fn save(&self) -> SerialState {
        let s = self.uart.state();
        let mut input = s.in_buffer;
        input.extend(&self.queue);
        SerialState {
            baud_divisor_low: s.baud_divisor_low,
            baud_divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            input,
        }
    }

    /// The UART with this state, in place of `self`, with the same output; `interrupt` is its new
    /// line. An interrupt that was pending is raised again: the edge may have been on its way to
    /// the interrupt controller when the state was taken. One edge too many finds an empty IIR, and
    /// drivers expect that; one too few hangs them.
    ///
    /// # Errors
    /// [`SerialError`] when the state is impossible (nothing changed), or when the interrupt cannot
    /// be raised (the UART keeps its old registers and has lost its output: drop it).
    pub fn restore(
        &mut self,
        state: &SerialState,
        interrupt: Box<dyn Trigger>,
    ) -> Result<(), SerialError> {
        if state.input.len() > INPUT_LIMIT {
            return Err(SerialError::TooMuchInput(state.input.len()));
        }
        let (fifo, queue) = state.input.split_at(state.input.len().min(FIFO));
        let uart = UartState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: fifo.to_vec(),
        };
        let output = std::mem::take(self.uart.writer_mut());
        self.uart = match Uart::from_state(&uart, SuperIo(interrupt), NoEvents, output) {
            Ok(uart) => uart,
            Err(Error::Trigger(e) | Error::IOError(e)) => return Err(SerialError::Interrupt(e)),
            Err(Error::FullFifo) => return Err(SerialError::TooMuchInput(fifo.len())),
        };
        self.queue = queue.iter().copied().collect();
        Ok(())
    }

    fn fill_fifo(&mut self) {
        while !self.queue.is_empty() && self.uart.fifo_capacity() > 0 {
            let (front, _) = self.queue.as_slices();
            // A failed interrupt leaves the bytes in the FIFO, so they count as taken; a UART in
            // loop-back takes nothing and the bytes wait.
            let room = self.uart.fifo_capacity().min(front.len());
            let taken = match self.uart.enqueue_raw_bytes(&front[..room]) {
                Ok(n) => n,
                Err(Error::Trigger(_)) => room,
                Err(_) => 0,
            };
            if taken == 0 {
                break;
            }
            self.queue.drain(..taken);
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (i, byte) in (0u64..).zip(data) {
            *byte = self.uart.read(register(offset + i));
        }
        self.fill_fifo();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (i, byte) in (0u64..).zip(data) {
            // The only error is an interrupt that could not be raised. The driver polls LSR too.
            let _ = self.uart.write(register(offset + i), *byte);
        }
        // Leaving loop-back makes room.
        self.fill_fifo();
    }
}

/// The bus has checked that the access lies inside the device.
fn register(offset: u64) -> u8 {
    u8::try_from(offset).unwrap_or(u8::MAX)
}

/// The writer behind the UART. It never fails: a guest must not notice an unread
/// console.
struct Output {
    to: Box<dyn Write + Send>,
    lost: u64,
}

impl Default for Output {
    fn default() -> Self {
        Self {
            to: Box::new(std::io::sink()),
            lost: 0,
        }
    }
}

impl Write for Output {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        if self.to.write_all(buf).is_err() {
            self.lost = self
                .lost
                .saturating_add(u64::try_from(buf.len()).unwrap_or(u64::MAX));
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        // A flush that fails says nothing about which bytes are lost; the next write will.
        let _ = self.to.flush();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Count(Arc<AtomicUsize>);
    impl Trigger for Count {
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);
    impl Write for Shared {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(buf);
            Ok(buf.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }

    fn read(serial: &mut Serial, offset: u64) -> u8 {
        let mut byte = [0];
        serial.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn output_arrives_and_a_broken_writer_is_counted() {
        let out = Shared::default();
        let mut serial = Serial::new(Box::new(Count::default()), Box::new(out.clone()));
        serial.write(0, b"o");
        serial.write(0, b"k");
        assert_eq!(*out.0.lock().unwrap(), b"ok");
        let mut serial = Serial::new(Box::new(Count::default()), Box::new(Broken));
        serial.write(0, b"x");
        assert_eq!(serial.lost_output(), 1);
        assert_eq!(read(&mut serial, 5) & 0x20, 0x20, "transmitter stays empty");
    }

    #[test]
    fn input_beyond_the_fifo_arrives_in_order_and_is_bounded() {
        let irq = Count::default();
        let mut serial = Serial::new(Box::new(irq.clone()), Box::new(io::sink()));
        serial.write(1, &[1]); // IER: received data
        let sent: Vec<u8> = (0..200u8).collect();
        assert_eq!(serial.input(&sent), 200);
        assert!(irq.0.load(Ordering::SeqCst) >= 1);
        let mut got = Vec::new();
        while read(&mut serial, 5) & 1 == 1 {
            got.push(read(&mut serial, 0));
        }
        assert_eq!(got, sent);
        assert_eq!(serial.input(&vec![0; INPUT_LIMIT + 5]), INPUT_LIMIT);
        assert_eq!(serial.input(&[0]), 0);
    }

    #[test]
    fn a_state_goes_on_where_it_was() {
        let out = Shared::default();
        let mut a = Serial::new(Box::new(Count::default()), Box::new(io::sink()));
        a.write(3, &[0x83]);
        a.write(0, &[7]); // divisor
        a.write(3, &[0x03]);
        a.write(7, &[0x5a]);
        a.write(1, &[1]);
        let sent: Vec<u8> = (0..100).collect();
        a.input(&sent);
        let state = a.save();
        let irq = Count::default();
        let mut b = Serial::new(Box::new(Count::default()), Box::new(out.clone()));
        b.restore(&state, Box::new(irq.clone())).unwrap();
        assert_eq!(b.save(), state);
        assert_eq!(
            irq.0.load(Ordering::SeqCst),
            1,
            "pending interrupt raised again"
        );
        assert_eq!(read(&mut b, 7), 0x5a);
        for want in sent {
            assert_eq!(read(&mut b, 0), want);
        }
        b.write(0, b"!");
        assert_eq!(*out.0.lock().unwrap(), b"!", "the output is kept");
    }

    #[test]
    fn an_impossible_state_is_refused() {
        let mut a = Serial::new(Box::new(Count::default()), Box::new(io::sink()));
        let mut state = a.save();
        state.input = vec![0; INPUT_LIMIT + 1];
        assert!(matches!(
            a.restore(&state, Box::new(Count::default())),
            Err(SerialError::TooMuchInput(_))
        ));
    }
}
