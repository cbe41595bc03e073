//! Frames and their header, `struct virtio_net_hdr_v1` (§5.1.6).

pub use crate::state::MacAddress;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// Bytes of the header before each frame: flags, GSO type, four lengths and offsets, number of
/// buffers.
pub const HEADER: usize = 12;
/// The longest frame with its header: a 64 KiB segment to be cut up, an Ethernet header and a VLAN
/// tag.
pub const MAX_FRAME: usize = HEADER + (64 << 10) + 18;

/// Text that is no address a network card can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no MAC address of a network card: give six bytes such as 52:54:00:12:34:56, the first of them even"
)]
pub struct MacError(String);

impl std::str::FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let error = || MacError(text.to_owned());
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(error)?;
            if !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        let mac = Self(mac);
        if parts.next().is_some() || !mac.is_unicast() {
            return Err(error());
        }
        Ok(mac)
    }
}

impl MacAddress {
    /// Whether it can be a card's own address: neither a group's nor all zeros.
    #[must_use]
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }

    /// A locally administered unicast address from random bytes.
    #[must_use]
    pub fn local(mut random: [u8; 6]) -> Self {
        random[0] = random[0] & 0xfc | 2;
        Self(random)
    }
}

impl std::fmt::Display for MacAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Writes the number of buffers that a received frame is spread over.
pub(super) fn set_buffers(frame: &mut [u8], count: u16) {
    if let Some(field) = frame.get_mut(10..12) {
        field.copy_from_slice(&count.to_le_bytes());
    }
}

/// Whether a frame asks for nothing that was not negotiated.
pub(super) fn may_be_sent(frame: &[u8], features: u64) -> bool {
    let has = |feature: u32| features & 1 << feature != 0;
    let [flags, gso, ..] = frame else {
        return false;
    };
    let checksum = match u32::from(*flags) {
        0 => true,
        VIRTIO_NET_HDR_F_NEEDS_CSUM => has(VIRTIO_NET_F_CSUM),
        _ => false,
    };
    let segments = match u32::from(*gso) {
        VIRTIO_NET_HDR_GSO_NONE => true,
        VIRTIO_NET_HDR_GSO_TCPV4 => has(VIRTIO_NET_F_HOST_TSO4),
        VIRTIO_NET_HDR_GSO_TCPV6 => has(VIRTIO_NET_F_HOST_TSO6),
        _ => false,
    };
    checksum && segments
}

/// A RARP request in the name of `mac` (RFC 903), which every switch on the way learns from. No
/// host answers it.
#[must_use]
pub fn rarp(mac: MacAddress) -> [u8; HEADER + 60] {
    // An Ethernet frame has 60 bytes at least.
    let mut frame = [0; HEADER + 60];
    let parts: [&[u8]; 7] = [
        &[0xff; 6],
        &mac.0,
        // RARP; Ethernet, IPv4, lengths of 6 and 4 bytes; request reverse.
        &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3],
        &mac.0,
        &[0; 4],
        &mac.0,
        &[0; 4],
    ];
    let bytes = parts.iter().flat_map(|part| part.iter());
    for (to, from) in frame.iter_mut().skip(HEADER).zip(bytes) {
        *to = *from;
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let mac: MacAddress = "52:54:00:aB:0c:ff".parse().unwrap();
        assert_eq!(mac.0, [0x52, 0x54, 0, 0xab, 0x0c, 0xff]);
        assert_eq!(mac.to_string().parse(), Ok(mac));
        for bad in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "53:54:00:12:34:56",
            "00:00:00:00:00:00",
            "52-54-00-12-34-56",
            "52:54:00:12:34:+5",
            "52:54:00:12:34:5g",
            "ff:ff:ff:ff:ff:ff",
        ] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
        assert!(MacAddress::local([0xff; 6]).is_unicast());
        assert!(MacAddress::local([0; 6]).is_unicast());
    }

    #[test]
    fn offloads_that_were_not_negotiated_are_not_passed_on() {
        let frame = |flags, gso| [flags, gso, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        assert!(may_be_sent(&frame(0, 0), 0));
        assert!(!may_be_sent(&frame(1, 0), 0));
        assert!(may_be_sent(&frame(1, 0), 1 << VIRTIO_NET_F_CSUM));
        assert!(!may_be_sent(&frame(2, 0), u64::MAX));
        let (tso4, tso6) = (1 << VIRTIO_NET_F_HOST_TSO4, 1 << VIRTIO_NET_F_HOST_TSO6);
        assert!(may_be_sent(&frame(0, 1), tso4) && !may_be_sent(&frame(0, 1), tso6));
        assert!(may_be_sent(&frame(0, 4), tso6) && !may_be_sent(&frame(0, 4), tso4));
        assert!(!may_be_sent(&frame(0, 3), u64::MAX), "UFO");
        assert!(!may_be_sent(&frame(0, 0x81), u64::MAX), "ECN");
    }

    #[test]
    fn rarp_is_as_the_rfc_says() {
        let mac = MacAddress([2, 3, 4, 5, 6, 7]);
        let frame = rarp(mac);
        let (header, frame) = frame.split_at(HEADER);
        assert_eq!(header, [0; HEADER]);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], mac.0);
        assert_eq!(frame[12..14], [0x80, 0x35]);
        assert_eq!(frame[20..22], [0, 3], "request reverse");
        assert_eq!((&frame[22..28], &frame[32..38]), (&mac.0[..], &mac.0[..]));
    }
}
