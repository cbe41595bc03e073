//! What the user has changed of a running migration, as the engine has taken it.

use super::record::ms;
use crate::options::{OnTimeout, Options};
use crate::port::Clock;
use crate::report::{Event, Steered};
use crate::sender::Pacer;
use crate::steering::Steering;
use std::time::Duration;

/// The options as they are now, and what the policy has not been told.
pub(super) struct Helm {
    pub(super) options: Options,
    pub(super) list: Vec<Steered>,
    /// Another policy is to decide.
    pub(super) other_policy: bool,
    /// The policy's limits are others.
    pub(super) other_limits: bool,
    /// The live phase is to end.
    pub(super) switch_over: bool,
    /// A round was cut short because the live phase's time was up.
    overdue: bool,
}

impl Helm {
    /// A report has at most this many changes: the first and the last.
    const KEPT: usize = 200;

    pub(super) fn new(options: &Options) -> Self {
        Self {
            options: options.clone(),
            list: Vec::new(),
            other_policy: false,
            other_limits: false,
            switch_over: false,
            overdue: false,
        }
    }

    /// Whether the round under way is to end because the live phase has lasted for so long: a pass
    /// over a slow link may take far longer than `--timeout`. Once, and only where nothing is lost
    /// by it: a guest that is to be stopped would wait for all that was not sent.
    pub(super) fn is_time_up(&mut self, lasted: Duration) -> bool {
        let ends = matches!(
            self.options.on_timeout,
            OnTimeout::Cancel | OnTimeout::Postcopy
        );
        if !ends || self.overdue || lasted < self.options.timeout {
            return false;
        }
        self.overdue = true;
        // The policy is told that a round was cut short.
        self.other_limits = true;
        true
    }

    /// Makes the changes that were accepted; whether the round under way is to end for them.
    pub(super) fn take(
        &mut self,
        steering: &Steering,
        (pacer, clock): (&Pacer, &dyn Clock),
        (began, round): (Duration, u32),
        events: &mut dyn FnMut(Event),
    ) -> bool {
        let mut cut = false;
        for change in steering.take() {
            let before = self.options.policy;
            self.options = change.applied_to(&self.options);
            if change.bandwidth.is_some() {
                pacer.set_rate(self.options.bandwidth, clock);
            }
            self.other_policy |= before != self.options.policy;
            self.other_limits |= change.concerns_policy();
            self.switch_over |= change.switchover;
            cut |= change.concerns_policy();
            self.overdue &= change.timeout.is_none();
            let steered = Steered {
                at_ms: ms(clock.now().saturating_sub(began)),
                round,
                change,
            };
            if self.list.len() >= Self::KEPT {
                self.list.remove(Self::KEPT / 2);
            }
            self.list.push(steered.clone());
            events(Event::Steered(steered));
        }
        cut
    }
}
