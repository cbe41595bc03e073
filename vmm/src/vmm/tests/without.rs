//! A guest without what only some have.

use super::*;
use crate::api::types::BalloonRequest;

#[test]
fn what_a_guest_does_not_have_is_refused_in_a_sentence() {
    let vmm = Rig::new().vmm;
    let says = |refusal: Refusal, what: &str| {
        let Refusal::Conflict(sentence) = refusal else {
            panic!("{refusal:?}");
        };
        assert!(sentence.contains(what), "{sentence}");
    };
    says(vmm.balloon().unwrap_err(), "has no balloon");
    let size = BalloonRequest::default();
    says(vmm.set_balloon(&size).unwrap_err(), "has no balloon");
    let file = serde_json::from_str(r#"{"path":"/nowhere"}"#).unwrap();
    says(
        vmm.snapshot(&file).unwrap_err(),
        "cannot be written to a file",
    );
    // A console that is not there takes no byte and holds none up.
    assert_eq!(vmm.console_input(b"typed"), 5);
    assert!(!vmm.set_console_size(80, 25));
    assert_eq!(vmm.status().console_output_lost, 0);
}
