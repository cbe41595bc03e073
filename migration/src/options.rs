//! What a user can ask of a migration. Serialisable: it travels through control sockets and files.

use crate::order::{Push, PushOrder};
use crate::page::PAGE_BYTES;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Durations as whole milliseconds in JSON.
mod millis {
    use serde::{Deserialize, Deserializer, Serializer};
    use std::time::Duration;

    pub fn serialize<S: Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        u64::deserialize(d).map(Duration::from_millis)
    }
}

pub(crate) mod optional_millis {
    use serde::{Deserialize, Deserializer, Serializer};
    use std::time::Duration;

    pub fn serialize<S: Serializer>(d: &Option<Duration>, s: S) -> Result<S::Ok, S::Error> {
        match d {
            Some(d) => super::millis::serialize(d, s),
            None => s.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(d)?.map(Duration::from_millis))
    }
}

/// Which family decides what is sent when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "lowercase")]
pub enum PolicyKind {
    /// Iterative pre-copy (Clark 2005).
    #[default]
    Precopy,
    /// Split transfer omitting redundant dirty pages (STORD, Cha 2014).
    Stord,
    /// Memory-bound pre-copy, multiplexed (MPLM, Chanchio 2018).
    Mplm,
    /// Post-copy (Hines 2009): the guest moves first, its memory follows.
    Postcopy,
    /// One pass of pre-copy, then post-copy.
    Hybrid,
    /// Whichever of these the model predicts to be best, by what is measured in the first pass.
    Auto,
}

impl PolicyKind {
    /// All there are.
    pub const ALL: &'static [Self] = &[
        Self::Precopy,
        Self::Stord,
        Self::Mplm,
        Self::Postcopy,
        Self::Hybrid,
        Self::Auto,
    ];

    /// The name that the command line and the report use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Stord => "stord",
            Self::Mplm => "mplm",
            Self::Postcopy => "postcopy",
            Self::Hybrid => "hybrid",
            Self::Auto => "auto",
        }
    }
}

/// How pages are made smaller on their way; see [`crate::codec`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// As `adaptive`, but begins without any coder and takes to one only where a sample and what
    /// was measured of the link promise a gain. Does without what the destination cannot do.
    #[default]
    Auto,
    /// Zero pages are left out, and that is all.
    None,
    /// zstd for every page.
    Zstd,
    /// Differences to what the destination has, and zeros left out.
    Delta,
    /// The cheapest coder that suffices for each page's content; backs off to none while coding
    /// takes longer than it saves.
    Adaptive,
}

impl Compress {
    /// Whether it sends patches.
    #[must_use]
    pub const fn patches(self) -> bool {
        matches!(self, Self::Auto | Self::Adaptive | Self::Delta)
    }

    /// Whether it uses zstd.
    #[must_use]
    pub const fn zstd(self) -> bool {
        matches!(self, Self::Auto | Self::Adaptive | Self::Zstd)
    }
}

/// How the guest's dirty pages are found. The engine does not care: it is for the guest's side,
/// which was built with one of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
// Exhaustive: a machine is built for each of them, or cannot be.
pub enum Tracking {
    /// By whatever is better there.
    #[default]
    Auto,
    /// By a bit for each page.
    Log,
    /// By a ring for each processor.
    Ring,
}

impl Tracking {
    /// The name that the command line uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Log => "log",
            Self::Ring => "ring",
        }
    }
}

/// What to do when the time is up, or the rounds, or pending pages stop shrinking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "lowercase")]
pub enum OnTimeout {
    /// Give up: the guest stays where it is. The default, because it is the only answer that
    /// cannot break the downtime target.
    #[default]
    Cancel,
    /// Stop and copy whatever is pending, however long that takes.
    Stop,
    /// Move the guest now and let the pending pages follow (post-copy).
    Postcopy,
    /// Slow the guest down until its rounds get smaller.
    Throttle,
}

impl OnTimeout {
    /// The name that the command line uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Stop => "stop",
            Self::Postcopy => "postcopy",
            Self::Throttle => "throttle",
        }
    }
}

/// Whether the guest's memory itself is given to a destination on the same host, so that no page
/// need be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "lowercase")]
pub enum Handover {
    /// Where the link can carry it and the destination takes it.
    #[default]
    Auto,
    /// Or the migration fails.
    On,
    /// Never: pages are sent, as to another host.
    Off,
}

/// The options of one migration; [`Default`] is what `ferry migrate` does without flags.
///
/// Built by functional update, `Options { …, ..Options::default() }`:
/// a new field has a default and breaks no caller. `#[non_exhaustive]` would forbid just that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// The policy.
    pub policy: PolicyKind,
    /// The longest acceptable pause, counting device state.
    #[serde(rename = "downtime_ms", with = "millis")]
    pub downtime: Duration,
    /// The longest acceptable live phase. With [`OnTimeout::Cancel`] and [`OnTimeout::Postcopy`] it
    /// ends within a round; else the round under way is finished.
    #[serde(rename = "timeout_ms", with = "millis")]
    pub timeout: Duration,
    /// What happens after it.
    pub on_timeout: OnTimeout,
    /// With [`OnTimeout::Throttle`]: the most that a processor of the guest is slowed, in per cent
    /// of its time.
    pub throttle: u8,
    /// Never let the guest run at the destination before its memory is there: `auto` does without
    /// post-copy, and a policy that is nothing else is refused.
    pub no_postcopy: bool,
    /// The most rounds of the live phase; `None` leaves it to the time limit.
    pub max_rounds: Option<u32>,
    /// The sender's cap in bytes per second; `None` is as fast as the link takes.
    pub bandwidth: Option<u64>,
    /// STORD: into how many pieces a set of pages is split. The paper finds the largest gain at 2.
    pub split: u32,
    /// MPLM: how many pages of the dirty group are sent for every 100 of the group that was not
    /// sent yet. 100 is turn and turn about.
    pub turn_share: u32,
    /// MPLM: how often the dirty log is looked at.
    #[serde(rename = "sync_ms", with = "millis")]
    pub sync: Duration,
    /// Send pages that are dirtied often late in a round, so that they are sent again less (dynamic
    /// page transfer reordering, Svärd 2012); in the first round, regions that are being written
    /// to. `None` is what suits the policy; see [`reorders`](Self::reorders).
    pub reorder: Option<bool>,
    /// Post-copy: in which order unrequested pages follow.
    pub order: PushOrder,
    /// Post-copy with bubbling: how many streams of faults have a bubble each; 1 is the
    /// single-pivot form.
    pub pivots: u16,
    /// Data channels beside the control channel; 1 means that pages share the control channel.
    /// `None` opens as many as processors and link may be worth, and uses those that turn out to
    /// be; see [`crate::data_channels`].
    pub channels: Option<u16>,
    /// How pages are made smaller on their way.
    pub compress: Compress,
    /// Bytes of pages that the source keeps a copy of, so that they can be sent as differences;
    /// more than the guest has are never kept, and 0 keeps none. Memory is taken as the cache
    /// fills.
    pub delta_cache: u64,
    /// How dirty pages are to be found; a migration of a guest that has it otherwise is refused.
    pub dirty: Tracking,
    /// Move the contents of the guest's disks too: they are on no storage that both hosts reach.
    pub copy_disk: bool,
    /// Hash all memory on both sides in the pause and fail on a difference.
    pub verify: bool,
    /// Whether memory is handed over instead of being sent.
    pub handover: Handover,
    /// Post-copy: memory that the destination says to have is given back to the source's host while
    /// the rest follows.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub free_source: bool,
    /// The longest that the guest may stand still, whatever the destination does: after that it
    /// runs at the source again. `None` is 30 s and four times the predicted pause.
    #[serde(
        rename = "max_pause_ms",
        with = "optional_millis",
        skip_serializing_if = "Option::is_none"
    )]
    pub max_pause: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            policy: PolicyKind::Precopy,
            downtime: Duration::from_millis(300),
            timeout: Duration::from_secs(600),
            on_timeout: OnTimeout::Cancel,
            throttle: Self::MAX_THROTTLE,
            no_postcopy: false,
            max_rounds: None,
            bandwidth: None,
            split: 2,
            turn_share: 100,
            sync: Duration::from_millis(250),
            reorder: None,
            order: PushOrder::Bubble,
            pivots: 8,
            channels: None,
            compress: Compress::Auto,
            delta_cache: 64 << 20,
            dirty: Tracking::Auto,
            copy_disk: false,
            verify: false,
            handover: Handover::Auto,
            free_source: false,
            max_pause: None,
        }
    }
}

/// Options that cannot be meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// Not between 1 and [`Options::MAX_CHANNELS`].
    #[error("{0} channels asked for; give 1 to {max}", max = Options::MAX_CHANNELS)]
    Channels(u16),
    /// A cap of less than a page per second.
    #[error("a bandwidth cap of {0} bytes per second sends nothing; give at least 4096")]
    Bandwidth(u64),
    /// A set cannot be split like that.
    #[error("a split into {0} pieces was asked for; give 1 to {max}", max = Options::MAX_SPLIT)]
    Split(u32),
    /// More dirty pages than any bound is worth.
    #[error("a turn share of {0} % was asked for; give 0 to {max}", max = Options::MAX_SHARE)]
    Share(u32),
    /// Differences to nothing.
    #[error("--compress delta needs a cache of at least a page; give --delta-cache 1M or more")]
    Cache,
    /// Not between 1 and [`Push::MAX_PIVOTS`].
    #[error("{0} pivots were asked for; give 1 to {max}", max = Push::MAX_PIVOTS)]
    Pivots(u16),
    /// Post-copy is asked for and forbidden.
    #[error(
        "--no-postcopy contradicts --policy postcopy, --policy hybrid and --on-timeout postcopy; leave one of them out"
    )]
    PostCopy,
    /// Memory is given back only while pages follow the guest.
    #[error(
        "--free-source gives memory back while pages follow the guest; give --policy postcopy, hybrid or auto, or --on-timeout postcopy, with it"
    )]
    FreeSource,
    /// A pause of no time.
    #[error("max_pause_ms is 0: no guest can be moved like that; give at least 1")]
    Pause,
    /// A guest that stands still, or one that is not slowed.
    #[error("a throttle of {0} % was asked for; give 1 to {max}", max = Options::MAX_THROTTLE)]
    Throttle(u8),
    /// No round may be sent.
    #[error("max_rounds is 0; give at least 1")]
    Rounds,
}

impl Options {
    /// The most data channels of a migration.
    pub const MAX_CHANNELS: u16 = 64;

    /// The most pieces of a STORD split.
    pub const MAX_SPLIT: u32 = 1024;
    /// The largest share of MPLM's dirty group, in per cent of the other.
    pub const MAX_SHARE: u32 = 1000;
    /// The most that a guest can be slowed, in per cent of its time.
    pub const MAX_THROTTLE: u8 = 99;

    /// Whether the destination must be able to run the guest before its memory is there.
    #[must_use]
    pub fn needs_post_copy(&self) -> bool {
        matches!(self.policy, PolicyKind::Postcopy | PolicyKind::Hybrid)
            || self.on_timeout == OnTimeout::Postcopy
    }

    /// Whether the guest may run at the destination before its memory is there, where the
    /// destination is able to.
    #[must_use]
    pub fn may_post_copy(&self) -> bool {
        self.needs_post_copy() || self.policy == PolicyKind::Auto && !self.no_postcopy
    }

    /// The defaults, but for what was added to the algorithms since they were published: pages go
    /// by address.
    #[must_use]
    pub fn as_published() -> Self {
        Self {
            reorder: Some(false),
            ..Self::default()
        }
    }

    /// Whether pages that are dirtied often go late in a round. By themselves pre-copy and hybrid
    /// do that; STORD and MPLM, which say themselves what goes when, keep the order of their
    /// papers.
    #[must_use]
    pub const fn reorders(&self) -> bool {
        match self.reorder {
            Some(reorder) => reorder,
            None => matches!(
                self.policy,
                PolicyKind::Precopy | PolicyKind::Hybrid | PolicyKind::Auto
            ),
        }
    }

    /// Checks what a type cannot.
    ///
    /// # Errors
    /// [`OptionsError`], in a sentence for the user.
    pub fn check(&self) -> Result<(), OptionsError> {
        if let Some(channels) = self.channels
            && (channels == 0 || channels > Self::MAX_CHANNELS)
        {
            return Err(OptionsError::Channels(channels));
        }
        if let Some(rate) = self.bandwidth
            && rate < 4096
        {
            return Err(OptionsError::Bandwidth(rate));
        }
        if self.split == 0 || self.split > Self::MAX_SPLIT {
            return Err(OptionsError::Split(self.split));
        }
        if self.turn_share > Self::MAX_SHARE {
            return Err(OptionsError::Share(self.turn_share));
        }
        if self.compress == Compress::Delta && self.delta_cache < PAGE_BYTES {
            return Err(OptionsError::Cache);
        }
        if self.pivots == 0 || usize::from(self.pivots) > Push::MAX_PIVOTS {
            return Err(OptionsError::Pivots(self.pivots));
        }
        if self.no_postcopy && self.needs_post_copy() {
            return Err(OptionsError::PostCopy);
        }
        if self.free_source && !self.may_post_copy() {
            return Err(OptionsError::FreeSource);
        }
        if self.max_pause == Some(Duration::ZERO) {
            return Err(OptionsError::Pause);
        }
        if self.throttle == 0 || self.throttle > Self::MAX_THROTTLE {
            return Err(OptionsError::Throttle(self.throttle));
        }
        if self.max_rounds == Some(0) {
            return Err(OptionsError::Rounds);
        }
        Ok(())
    }
}
