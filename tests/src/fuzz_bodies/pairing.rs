//! What a user pastes and a stranger sends before anything is trusted.

use ferry_migration::net::tls::{Admission, PairingLine};
use ferry_vmm::migrate::Network;

/// A pairing line, an admission, and a network of `--accept-from`: refused, or what is printed of
/// it is the same again. Returns whether the bytes are a pairing line.
pub fn pairing(bytes: &[u8]) -> bool {
    if let Some(bytes) = bytes.first_chunk::<{ Admission::BYTES }>()
        && let Some(admission) = Admission::decode(bytes)
    {
        assert_eq!(Admission::decode(&admission.encode()), Some(admission));
    }
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    if let Ok(network) = text.parse::<Network>() {
        assert_eq!(network.to_string().parse(), Ok(network));
    }
    let Ok(line) = text.parse::<PairingLine>() else {
        return false;
    };
    let printed = line.to_string();
    assert_eq!(printed, text.trim().to_ascii_lowercase());
    assert_eq!(printed.parse(), Ok(line));
    true
}
