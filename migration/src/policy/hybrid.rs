//! Hybrid: one pass of pre-copy sends what stays as it is, then post-copy moves the guest; what was
//! dirtied meanwhile follows (Hines and Gopalan 2009, §3.4).

use super::{Decision, Policy, SendOrder, View};
use crate::options::Options;
use crate::order::PushOrder;

/// One pass of pre-copy, then post-copy.
#[derive(Debug)]
pub struct Hybrid {
    order: PushOrder,
    send: SendOrder,
}

impl Hybrid {
    /// With the orders of the options.
    #[must_use]
    pub const fn new(options: &Options) -> Self {
        Self {
            order: options.order,
            send: SendOrder::from_options(options),
        }
    }
}

impl Policy for Hybrid {
    fn name(&self) -> &'static str {
        "hybrid"
    }

    fn next(&mut self, view: &View<'_>) -> Decision {
        // The pass may have been cut short, or begun by another policy.
        let mut unsent = view.pending.clone();
        unsent.subtract(view.sent);
        if !unsent.is_empty() {
            return Decision::Send {
                pages: unsent,
                order: self.send,
            };
        }
        Decision::HandOver {
            order: self.order,
            why: format!(
                "one pass was sent, {} pages were dirtied since; push order {}",
                view.pending_pages,
                self.order.name()
            ),
        }
    }

    fn hands_over(&self) -> bool {
        true
    }
}
