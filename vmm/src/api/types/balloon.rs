//! The balloon's JSON.

use crate::machine::{BalloonAuto, BalloonInfo};
use serde::{Deserialize, Serialize};

/// The answer to `GET /v1/balloon`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatus {
    /// Bytes that the guest is asked to give.
    pub target_bytes: u64,
    /// Bytes that it has given, as it says.
    pub actual_bytes: u64,
    /// Whether the guest has a driver for it: without one nothing goes in or out.
    #[serde(default)]
    pub driver: bool,
    /// Bytes that went back to the host so far, inflated or reported free, each time that they did.
    pub discarded_bytes: u64,
    /// How the size is moved automatically; `null` when it is not.
    pub auto: Option<BalloonAuto>,
    /// What the guest last said about its memory; `null` when it has said nothing.
    pub guest: Option<GuestMemory>,
}

/// What a guest says about its memory. All of it is the guest's word; `null` is what it did not
/// say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestMemory {
    /// How long ago it said so, in milliseconds; `null` when that was before it came here.
    pub age_ms: Option<u64>,
    /// Bytes there are.
    pub total_bytes: Option<u64>,
    /// Bytes that are not used for anything.
    pub free_bytes: Option<u64>,
    /// Bytes that could be had without swapping.
    pub available_bytes: Option<u64>,
    /// Bytes of caches that could be dropped.
    pub caches_bytes: Option<u64>,
    /// Bytes swapped in so far.
    pub swapped_in_bytes: Option<u64>,
    /// Bytes swapped out so far.
    pub swapped_out_bytes: Option<u64>,
    /// Page faults that needed I/O so far.
    pub major_faults: Option<u64>,
    /// Processes killed for want of memory so far.
    pub oom_kills: Option<u64>,
}

impl From<BalloonInfo> for BalloonStatus {
    fn from(info: BalloonInfo) -> Self {
        let age_ms = info
            .statistics_age
            .map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        Self {
            target_bytes: info.target_bytes,
            actual_bytes: info.actual_bytes,
            driver: info.driver,
            discarded_bytes: info.discarded_bytes,
            auto: info.auto,
            guest: info.statistics.map(|s| GuestMemory {
                age_ms,
                total_bytes: s.total_memory,
                free_bytes: s.free_memory,
                available_bytes: s.available_memory,
                caches_bytes: s.disk_caches,
                swapped_in_bytes: s.swap_in,
                swapped_out_bytes: s.swap_out,
                major_faults: s.major_faults,
                oom_kills: s.oom_kills,
            }),
        }
    }
}

/// The body of `PUT /v1/balloon`: one of the two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BalloonRequest {
    /// A size, which stays; 0 gives the guest all of its memory.
    pub size_bytes: Option<u64>,
    /// Move the size automatically.
    pub auto: Option<BalloonWish>,
}

/// How to move the balloon; what is left out follows from the guest's RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BalloonWish {
    /// Between two steps of inflating, in milliseconds.
    pub interval_ms: Option<u32>,
    /// Bytes that stay available to the guest.
    pub reserve_bytes: Option<u64>,
}

impl BalloonWish {
    /// The settings for a guest with `ram` bytes.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn settings(&self, ram: u64) -> Result<BalloonAuto, String> {
        let usual = BalloonAuto::for_ram(ram);
        let wanted = BalloonAuto {
            interval_ms: self.interval_ms.unwrap_or(usual.interval_ms),
            reserve_bytes: self.reserve_bytes.unwrap_or(usual.reserve_bytes),
        };
        let range = BalloonAuto::INTERVALS_MS;
        if !range.contains(&wanted.interval_ms) {
            return Err(format!(
                "a balloon was to be moved every {} ms; give an interval of {} ms to an hour",
                wanted.interval_ms,
                range.start()
            ));
        }
        if wanted.bounded(ram) != wanted {
            return Err(format!(
                "a reserve of {} bytes was asked for; give a page (4096) at least and half of the guest's RAM ({}) at most",
                wanted.reserve_bytes,
                ram / 2
            ));
        }
        Ok(wanted)
    }
}
