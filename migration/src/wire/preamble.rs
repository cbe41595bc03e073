//! The fixed first 64 bytes of every channel, in both directions.

use crate::page::PAGE_SHIFT;
use crate::port::SessionId;

/// The protocol version that this build speaks; it also speaks the one before.
pub const VERSION: u16 = 1;
/// The oldest version that this build speaks: N and N−1, and 0 never existed.
const OLDEST: u16 = if VERSION > 1 { VERSION - 1 } else { 1 };
/// Bytes in a preamble.
pub const PREAMBLE_BYTES: usize = 64;
const MAGIC: [u8; 8] = *b"FERRYMIG";
/// Bytes of the alert that ends a TLS handshake: the shortest answer of a peer that wants TLS.
pub(super) const TLS_ALERT_BYTES: usize = 7;
/// Guests of this build.
const ARCH_X86_64: u8 = 1;

/// What a channel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
// Exhaustive: a receiver gives each kind of connection to the part that serves it.
pub enum Role {
    /// The first: handshake, state, commit; pages too when there are no data channels.
    Control = 0,
    /// Pages only.
    Data = 1,
    /// Post-copy's page requests and their answers.
    Fault = 2,
    /// A new control channel for a session that lost its old one.
    Recover = 3,
    /// Measures the way to a receiver; see [`crate::probe`].
    Probe = 4,
}

impl Role {
    const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Control),
            1 => Some(Self::Data),
            2 => Some(Self::Fault),
            3 => Some(Self::Recover),
            4 => Some(Self::Probe),
            _ => None,
        }
    }
}

/// The first words on a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// The newest version that the speaker knows.
    pub version: u16,
    /// The oldest version that the speaker still speaks.
    pub oldest: u16,
    /// What the channel is for.
    pub role: Role,
    /// Which of the channels with this role.
    pub channel: u16,
    /// The migration.
    pub session: SessionId,
}

/// Why a peer's preamble was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PreambleError {
    /// Not our magic number.
    #[error("the peer does not speak ferry's migration protocol (its first bytes are {0:02x?})")]
    Magic([u8; 8]),
    /// A record of TLS.
    #[error("the peer speaks TLS here, and this side does not: give --tls or --pair on both sides")]
    Tls,
    /// No version in common.
    #[error(
        "the peer speaks migration protocol {theirs} (oldest {theirs_oldest}), this ferry speaks {VERSION} \
         (oldest {OLDEST}); upgrade the older one"
    )]
    Version {
        /// The peer's newest.
        theirs: u16,
        /// The peer's oldest.
        theirs_oldest: u16,
    },
    /// The checksum is wrong.
    #[error("the peer's preamble is damaged (checksum {found:#010x}, computed {computed:#010x})")]
    Checksum {
        /// As sent.
        found: u32,
        /// As it should be.
        computed: u32,
    },
    /// Another architecture.
    #[error("the peer's guest is of architecture {0}, this host runs x86_64 ({ARCH_X86_64})")]
    Architecture(u8),
    /// Another page size.
    #[error("the peer uses pages of 2^{0} bytes, this host 2^{PAGE_SHIFT}")]
    PageSize(u8),
    /// A role that this version does not know.
    #[error("the peer opened a channel of unknown role {0}")]
    Role(u8),
    /// Not the session that this side is in.
    #[error("the peer belongs to migration {theirs}, this one is {ours}")]
    Session {
        /// The peer's.
        theirs: SessionId,
        /// Ours.
        ours: SessionId,
    },
}

/// Whether this begins an alert (21) or a handshake (22) of TLS (RFC 8446 §5.1).
pub(super) const fn is_tls(bytes: &[u8]) -> bool {
    matches!(bytes, [21 | 22, 3, ..])
}

impl Preamble {
    /// What this build says on a channel.
    #[must_use]
    pub const fn new(role: Role, channel: u16, session: SessionId) -> Self {
        Self {
            version: VERSION,
            oldest: OLDEST,
            role,
            channel,
            session,
        }
    }

    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let mut bytes = [0; PREAMBLE_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.version.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.oldest.to_le_bytes());
        bytes[12] = ARCH_X86_64;
        // PAGE_SHIFT is 12.
        bytes[13] = PAGE_SHIFT.to_le_bytes()[0];
        bytes[14] = self.role as u8;
        bytes[16..18].copy_from_slice(&self.channel.to_le_bytes());
        bytes[20..36].copy_from_slice(&self.session.0);
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Checks and reads a peer's preamble. Magic and version come first: a version mismatch must
    /// be told as such even if later versions lay out the rest differently.
    ///
    /// # Errors
    /// [`PreambleError`].
    pub fn decode(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Self, PreambleError> {
        let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut magic = [0; 8];
        magic.copy_from_slice(&bytes[..8]);
        if is_tls(bytes) {
            return Err(PreambleError::Tls);
        }
        if magic != MAGIC {
            return Err(PreambleError::Magic(magic));
        }
        let (version, oldest) = (short(8), short(10));
        if version < OLDEST || oldest > VERSION || oldest > version {
            return Err(PreambleError::Version {
                theirs: version,
                theirs_oldest: oldest,
            });
        }
        let found = u32::from_le_bytes([bytes[60], bytes[61], bytes[62], bytes[63]]);
        let computed = crc32c::crc32c(&bytes[..60]);
        if found != computed {
            return Err(PreambleError::Checksum { found, computed });
        }
        if bytes[12] != ARCH_X86_64 {
            return Err(PreambleError::Architecture(bytes[12]));
        }
        if u32::from(bytes[13]) != PAGE_SHIFT {
            return Err(PreambleError::PageSize(bytes[13]));
        }
        let role = Role::from_byte(bytes[14]).ok_or(PreambleError::Role(bytes[14]))?;
        let mut session = SessionId([0; 16]);
        session.0.copy_from_slice(&bytes[20..36]);
        Ok(Self {
            version,
            oldest,
            role,
            channel: short(16),
            session,
        })
    }

    /// The version that both sides speak.
    #[must_use]
    pub fn common_version(&self) -> u16 {
        self.version.min(VERSION)
    }

    /// Checks that the answer belongs to this session.
    ///
    /// # Errors
    /// [`PreambleError::Session`].
    pub fn expect_session(&self, ours: SessionId) -> Result<(), PreambleError> {
        if self.session == ours {
            Ok(())
        } else {
            Err(PreambleError::Session {
                theirs: self.session,
                ours,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Preamble {
        Preamble::new(Role::Data, 7, SessionId([9; 16]))
    }

    #[test]
    fn round_trips() {
        assert_eq!(Preamble::decode(&sample().encode()), Ok(sample()));
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let good = sample().encode();
        for bit in 0..PREAMBLE_BYTES * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Preamble::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn tls_is_recognised() {
        let mut bytes = sample().encode();
        bytes[..3].copy_from_slice(&[22, 3, 1]);
        assert_eq!(Preamble::decode(&bytes), Err(PreambleError::Tls));
    }

    #[test]
    fn another_version_is_told_with_both_numbers() {
        let newer = Preamble {
            version: VERSION + 5,
            oldest: VERSION + 4,
            ..sample()
        };
        let message = Preamble::decode(&newer.encode()).unwrap_err().to_string();
        assert!(message.contains(&format!("{}", VERSION + 5)), "{message}");
        assert!(message.contains(&format!("speaks {VERSION}")), "{message}");
        // A newer peer that still speaks ours is welcome.
        let compatible = Preamble {
            version: VERSION + 1,
            oldest: VERSION,
            ..sample()
        };
        assert_eq!(
            Preamble::decode(&compatible.encode())
                .unwrap()
                .common_version(),
            VERSION
        );
    }
}
