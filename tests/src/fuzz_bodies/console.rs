//! A guest that does anything at all to its console, and a user who types at it and resizes it.

use super::virtio::{Memory, Screen, Script, play_with};
use ferry_devices::console::{Console, INPUT_LIMIT};
use ferry_devices::virtio::{AnyVirtio, DeviceState, VirtioDevice};

/// Bytes that are typed at once, for each byte of the script's count.
const PIECE: usize = 300;

/// Bytes are what the guest does, as for [`virtio`](super::virtio()), and in between what the user
/// does.
///
/// Whatever it is, nothing panics or goes on forever. What the guest has not read is the end of
/// what was typed and taken, in order, also after moves; and the terminal's size is the last that
/// the device took.
pub fn console(bytes: &[u8]) {
    let make = |_| Console::new(Box::new(Screen)).unwrap();
    let mut user = User::default();
    play_with(bytes, None, make, |device, script| {
        user.acts(device, script)
    });
}

#[derive(Default)]
struct User {
    /// The console took so many bytes. Each is its number, less what does not fit.
    typed: usize,
    size: (u16, u16),
}

/// The byte that is typed as number `n`. A prime: no buffer's size hides a shift.
fn byte(n: usize) -> u8 {
    u8::try_from(n % 251).unwrap()
}

impl User {
    fn acts(&mut self, device: &VirtioDevice<Console, Memory>, script: &mut Script<'_>) {
        match script.byte() {
            Some(what @ 0..=127) => {
                let end = self.typed + usize::from(what) * PIECE;
                let keys: Vec<u8> = (self.typed..end).map(byte).collect();
                // A console that is busy takes nothing.
                let taken = device.try_while_running(|console| console.input(&keys));
                let taken = taken.unwrap_or(0);
                assert!(taken <= keys.len());
                self.typed += taken;
            }
            Some(what @ 128..=191) => {
                let size = (u16::from(what), u16::from(script.byte().unwrap_or(0)));
                if device.try_reconfigure(|console| console.set_size(size.0, size.1)) {
                    self.size = size;
                }
            }
            _ => self.checks(device),
        }
    }

    fn checks(&self, device: &VirtioDevice<Console, Memory>) {
        device.pause().unwrap();
        let state = device.save();
        device.resume();
        let DeviceState::Console(state) = state.device else {
            panic!("another device's state: {state:?}");
        };
        let unread = state.input.len();
        assert!(unread <= INPUT_LIMIT && unread <= self.typed);
        let expected = (self.typed - unread..self.typed).map(byte);
        assert!(state.input.iter().copied().eq(expected), "of another order");
        assert_eq!((state.columns, state.rows), self.size);
    }
}
