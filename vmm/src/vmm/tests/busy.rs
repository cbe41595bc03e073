//! Requests that wait for the guest keep no other waiting.

use super::*;
use crate::api::types::{BalloonRequest, BalloonStatus};

/// A guest whose devices are busy until the test says otherwise.
struct Busy(Mutex<mpsc::Receiver<()>>, mpsc::SyncSender<()>);

impl Guest for Busy {
    fn info(&self) -> GuestInfo {
        GuestInfo {
            name: None,
            memory_bytes: 4096,
            cpus: 1,
            memory: None,
        }
    }
    fn is_running(&self) -> bool {
        true
    }
    fn pause(&self) -> Result<(), String> {
        self.wait();
        Ok(())
    }
    fn resume(&self) -> Result<(), String> {
        Ok(())
    }
    fn take_over(&self) -> Result<(), String> {
        Ok(())
    }
    fn stop(&self) {}
    fn power_button(&self) -> Result<(), String> {
        Ok(())
    }
    fn input(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }
    fn migration(&self, _: &str, _: &Security) -> Result<Box<dyn Migration>, String> {
        Err("none".into())
    }
    fn recovery(&self, _: &str, _: &str, _: &Security) -> Result<Box<dyn Migration>, String> {
        Err("none".into())
    }
    fn recording(&self) -> Result<Box<dyn Recording>, String> {
        Err("none".into())
    }
    fn balloon(&self) -> Option<&dyn GuestBalloon> {
        Some(self)
    }
}

impl GuestBalloon for Busy {
    fn status(&self) -> BalloonStatus {
        BalloonStatus::default()
    }
    fn set(&self, _: &BalloonRequest) -> Result<(), Refusal> {
        self.wait();
        Ok(())
    }
}

impl Busy {
    fn wait(&self) {
        self.1.send(()).unwrap();
        self.0.lock().unwrap().recv().unwrap();
    }
}

#[test]
fn a_status_is_answered_while_the_balloon_waits() {
    answers_during(|vmm| vmm.set_balloon(&BalloonRequest::default()));
}

#[test]
fn a_status_is_answered_while_a_device_is_slow_to_pause() {
    answers_during(Control::pause);
}

fn answers_during(request: fn(&Vmm) -> Result<(), Refusal>) {
    let (go, gate) = mpsc::channel();
    let (tell, told) = mpsc::sync_channel(1);
    let vmm = Vmm::new(Arc::new(Busy(Mutex::new(gate), tell)), true).unwrap();
    let asked = vmm.clone();
    let thread = std::thread::spawn(move || request(&asked));
    told.recv().unwrap();
    // On a thread of its own: one that waits would hang the test.
    let (tell, told) = mpsc::channel();
    let asking = vmm.clone();
    std::thread::spawn(move || tell.send(asking.status().state));
    let state = told.recv_timeout(Duration::from_secs(60));
    go.send(()).unwrap();
    assert_eq!(state, Ok(StateName::Running));
    thread.join().unwrap().unwrap();
}
