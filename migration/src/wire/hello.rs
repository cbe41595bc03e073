//! What is said in the handshake and around the commit, as JSON: fields can be added without a
//! new protocol version, and a capture can be read by eye.

use crate::page::RamLayout;
use crate::report::Faults;
use serde::{Deserialize, Serialize};

/// What both sides can do, as bits; what both offer is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Features(pub u64);

impl Features {
    /// Memory is hashed and compared.
    pub const VERIFY: Self = Self(1);
    /// Pages travel on data channels of their own.
    pub const CHANNELS: Self = Self(1 << 1);
    /// A lost control channel can be replaced after the commit.
    pub const RECOVER: Self = Self(1 << 2);

    /// The guest may run before its memory is there.
    pub const POST_COPY: Self = Self(1 << 3);
    /// Pages may be compressed by zstd.
    pub const ZSTD: Self = Self(1 << 8);
    /// Pages may be sent as patches: without their zeros, or as the difference to what was sent
    /// before.
    pub const PATCH: Self = Self(1 << 9);

    /// The contents of disks move too.
    pub const DISKS: Self = Self(1 << 16);
    /// The guest's memory itself comes beside the handshake, and no page is sent. Agreed on only
    /// where it did come.
    pub const SHARED_MEMORY: Self = Self(1 << 17);
    /// With the memory: open files that the guest's devices use come when the destination asks for
    /// them.
    pub const SHARED_FILES: Self = Self(1 << 18);

    /// Hashes of pages may come while the guest runs; in the pause only of those that were written
    /// since.
    pub const LIVE_HASHES: Self = Self(1 << 19);

    /// All that this build can do.
    pub const SUPPORTED: Self = Self(
        Self::VERIFY.0
            | Self::CHANNELS.0
            | Self::RECOVER.0
            | Self::POST_COPY.0
            | Self::ZSTD.0
            | Self::PATCH.0
            | Self::DISKS.0
            | Self::SHARED_MEMORY.0
            | Self::SHARED_FILES.0
            | Self::LIVE_HASHES.0,
    );

    /// These without `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Those of both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Those of either.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are here.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The source's opening: what is coming.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// What the source can do.
    pub offered: Features,
    /// What this migration cannot do without.
    pub required: Features,
    /// Where the guest has RAM.
    pub layout: RamLayout,
    /// Data channels that the source will open.
    pub channels: u16,
    /// Channels for page faults that the source will open.
    #[serde(default)]
    pub faults: u16,
    /// Bytes of each of the guest's disks, in order, whose contents move.
    #[serde(default, skip_serializing_if = "Vec::is_empty", alias = "stores")]
    pub disks: Vec<u64>,
    /// The policy's name, for the destination's log.
    pub policy: String,
    /// The machine's configuration, opaque here.
    #[serde(skip)]
    pub machine: Vec<u8>,
}

/// The destination's answer: the machine stands, paused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloAck {
    /// What will be used.
    pub features: Features,
    /// The newest version of the machine's state that the destination reads; a ferry that has no
    /// word for it reads the version from before it had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<u32>,
}

/// The destination has the whole guest and has checked it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Whether memory was compared with the source's hashes, and equal.
    pub verified: bool,
    /// Microseconds that comparing hashes took since the last round ended.
    #[serde(default)]
    pub compare_us: u64,
    /// Microseconds that restoring the machine's state took.
    pub restore_us: u64,
}

/// The destination runs the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// Microseconds from reading the commit to the first guest instruction.
    pub start_us: u64,
    /// Microseconds from the first guest instruction to the sending of this message.
    pub since_us: u64,
    /// Pages that are not in place yet (post-copy). To a source that reconnects, frames that list
    /// them follow.
    #[serde(default)]
    pub missing: u64,
    /// Whether hashes of all pages are wanted once those have arrived.
    #[serde(default)]
    pub verify: bool,
    /// Whether the destination says when pages that follow the guest are in place, where asked to
    /// ([`FLAG_TELL`](super::FLAG_TELL)).
    #[serde(default)]
    pub tells: bool,
}

/// Post-copy is over: every page is in place, or the guest has ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Arrived {
    /// The guest's page faults.
    pub faults: Faults,
    /// Pages that are not as the source sent them (with verification).
    pub different: u64,
    /// The guest ended before all its pages had come: the rest is not needed.
    #[serde(default)]
    pub ended: bool,
}

/// Why a handshake could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HelloError {
    /// Too short for its own length field.
    #[error("the peer's handshake is truncated")]
    Truncated,
    /// Not the JSON that it should be.
    #[error("the peer's handshake cannot be understood: {0}")]
    Json(#[from] serde_json::Error),
}

impl Hello {
    /// `u32` length of the JSON, the JSON, the machine.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        // A struct of plain fields always has a JSON form.
        let json = serde_json::to_vec(self).unwrap_or_default();
        let length = u32::try_from(json.len()).unwrap_or(u32::MAX);
        [&length.to_le_bytes()[..], &json, &self.machine].concat()
    }

    /// Reads it back.
    ///
    /// # Errors
    /// [`HelloError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, HelloError> {
        let (length, rest) = bytes
            .split_first_chunk::<4>()
            .ok_or(HelloError::Truncated)?;
        let length = u32::from_le_bytes(*length) as usize;
        let (json, machine) = rest.split_at_checked(length).ok_or(HelloError::Truncated)?;
        let mut hello: Self = serde_json::from_slice(json)?;
        hello.machine = machine.to_vec();
        Ok(hello)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Run;

    #[test]
    fn round_trips_and_survives_cuts() {
        let hello = Hello {
            offered: Features::SUPPORTED,
            required: Features::VERIFY,
            layout: RamLayout::new(vec![Run::new(0, 100), Run::new(200, 7)]).unwrap(),
            channels: 3,
            faults: 2,
            disks: vec![1 << 30, 512],
            policy: "precopy".into(),
            machine: vec![1, 2, 3],
        };
        let bytes = hello.encode();
        assert_eq!(Hello::decode(&bytes).unwrap(), hello);
        for cut in 0..bytes.len() - 3 {
            assert!(Hello::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn an_answer_without_a_state_version_is_one_of_an_older_peer() {
        let old: HelloAck = serde_json::from_str(r#"{"features":3}"#).unwrap();
        assert_eq!((old.features, old.state), (Features(3), None));
        let new = HelloAck {
            state: Some(4),
            ..old
        };
        let json = serde_json::to_string(&new).unwrap();
        assert_eq!(serde_json::from_str::<HelloAck>(&json).unwrap(), new);
    }

    #[test]
    fn a_hostile_layout_is_refused() {
        let json = br#"{"offered":1,"required":0,"layout":[{"first":0,"count":18446744073709551615}],"channels":1,"policy":"x"}"#;
        let bytes = [&u32::try_from(json.len()).unwrap().to_le_bytes()[..], json].concat();
        assert!(matches!(Hello::decode(&bytes), Err(HelloError::Json(_))));
    }

    #[test]
    fn unknown_fields_of_a_newer_peer_are_ignored() {
        let json = br#"{"offered":4294967295,"required":0,"layout":[{"first":0,"count":1}],"channels":1,"policy":"x","colour":"red"}"#;
        let bytes = [&u32::try_from(json.len()).unwrap().to_le_bytes()[..], json].concat();
        assert_eq!(
            Hello::decode(&bytes)
                .unwrap()
                .offered
                .and(Features::SUPPORTED),
            Features::SUPPORTED
        );
    }
}
