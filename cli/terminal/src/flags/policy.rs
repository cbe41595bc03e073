//! Which policy moves a guest, and its limits: `ferry migrate` and `ferry sim` take the same flags.

use super::{Switch, choice, switch};
use crate::units::duration;
use ferry_migration::options::{OnTimeout, Options, PolicyKind};
use ferry_migration::order::PushOrder;
use std::time::Duration;

/// The flags.
#[derive(Clone, Debug, clap::Args)]
// A group of this name would clash with that of the command.
#[group(skip)]
#[command(next_help_heading = "Policy")]
pub struct PolicyFlags {
    /// Which algorithm decides what is sent when. auto measures during the first pass, predicts
    /// what each would come to, takes the best that keeps --downtime and --timeout, and says why.
    #[arg(long, value_name = "POLICY", value_parser = choice::<PolicyKind>(), default_value = "precopy")]
    policy: PolicyKind,
    /// STORD: pieces into which a set of pages is split.
    #[arg(long, value_name = "K", default_value_t = 2)]
    split: u32,
    /// MPLM: pages of the dirty group for every 100 that were never sent.
    #[arg(long, value_name = "PERCENT", default_value_t = 100)]
    turn_share: u32,
    /// MPLM: how often the dirty log is read.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "250ms")]
    sync: Duration,
    /// Send pages that are dirtied often late in a round. In the first round, where that is not
    /// known yet, memory is sent in steps, and pages written meanwhile go last. auto: pre-copy and
    /// hybrid do, the others do not.
    #[arg(
        long,
        value_name = "WHEN",
        value_parser = switch(),
        num_args = 0..=1,
        require_equals = true,
        default_value = "auto",
        default_missing_value = "on"
    )]
    reorder: Switch,
    /// Post-copy: the order in which pages are pushed that the guest has not touched: demand (none
    /// is pushed), flush (by address) or bubble (around its page faults).
    #[arg(long, value_name = "ORDER", value_parser = choice::<PushOrder>(), default_value = "bubble")]
    order: PushOrder,
    /// Post-copy: how many streams of page faults are bubbled around at once.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pivots: u16,
    /// The longest acceptable downtime.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "300ms", help_heading = "Limits")]
    downtime: Duration,
    /// The longest acceptable live phase. A pass that takes longer is cut short where --on-timeout
    /// is cancel or postcopy.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10m", help_heading = "Limits")]
    timeout: Duration,
    /// What to do after it: cancel, stop (pause for as long as it takes), postcopy (move the guest,
    /// its pages follow), or throttle (slow the guest until its rounds get smaller).
    #[arg(
        long,
        value_name = "ACTION",
        value_parser = choice::<OnTimeout>(),
        default_value = "cancel",
        help_heading = "Limits"
    )]
    on_timeout: OnTimeout,
    /// With --on-timeout throttle: the most that the guest is slowed, in per cent of its time.
    #[arg(long, value_name = "PERCENT", default_value_t = Options::MAX_THROTTLE, help_heading = "Limits")]
    throttle: u8,
    /// Never depend on two hosts: auto does without post-copy.
    #[arg(long, help_heading = "Limits")]
    no_postcopy: bool,
}

impl PolicyFlags {
    /// The options that these flags set; all others have their defaults.
    #[must_use]
    pub fn options(&self) -> Options {
        Options {
            policy: self.policy,
            split: self.split,
            turn_share: self.turn_share,
            sync: self.sync,
            reorder: self.reorder.0,
            order: self.order,
            pivots: self.pivots,
            downtime: self.downtime,
            timeout: self.timeout,
            on_timeout: self.on_timeout,
            throttle: self.throttle,
            no_postcopy: self.no_postcopy,
            ..Options::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        flags: PolicyFlags,
    }

    fn parse(flags: &[&str]) -> Result<Options, String> {
        let cli = Cli::try_parse_from([&["ferry"], flags].concat()).map_err(|e| e.to_string())?;
        Ok(cli.flags.options())
    }

    #[test]
    fn without_flags_it_is_the_default() {
        assert_eq!(parse(&[]).unwrap(), Options::default());
    }

    #[test]
    fn every_flag_arrives() {
        let flags = "--policy stord --split 3 --turn-share 50 --sync 100ms --reorder --order flush --pivots 2 \
                     --downtime 50ms --timeout 2m --on-timeout stop --throttle 80 --no-postcopy";
        let flags: Vec<&str> = flags.split_whitespace().collect();
        let expected = Options {
            policy: PolicyKind::Stord,
            split: 3,
            turn_share: 50,
            sync: Duration::from_millis(100),
            reorder: Some(true),
            order: PushOrder::Flush,
            pivots: 2,
            downtime: Duration::from_millis(50),
            timeout: Duration::from_secs(120),
            on_timeout: OnTimeout::Stop,
            throttle: 80,
            no_postcopy: true,
            ..Options::default()
        };
        assert_eq!(parse(&flags).unwrap(), expected);
    }

    #[test]
    fn reordering_is_asked_for_or_left_to_the_policy() {
        for (flags, reorder) in [
            (&[] as &[&str], None),
            (&["--reorder=auto"], None),
            (&["--reorder"], Some(true)),
            (&["--reorder=on"], Some(true)),
            (&["--reorder=off"], Some(false)),
            (&["--reorder", "--split", "2"], Some(true)),
        ] {
            assert_eq!(parse(flags).unwrap().reorder, reorder, "{flags:?}");
        }
        for (policy, reorders) in [
            ("precopy", true),
            ("hybrid", true),
            ("stord", false),
            ("mplm", false),
        ] {
            let reorder = |flag| parse(&["--policy", policy, flag]).unwrap().reorders();
            assert_eq!(reorder("--reorder=auto"), reorders, "{policy}");
            assert!(
                reorder("--reorder") && !reorder("--reorder=off"),
                "{policy}"
            );
        }
        let error = parse(&["--reorder=perhaps"]).unwrap_err();
        assert!(error.contains("auto, on, off"), "{error}");
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        let error = parse(&["--policy", "magic"]).unwrap_err();
        assert!(
            error.contains("magic") && error.contains("precopy"),
            "{error}"
        );
    }
}
