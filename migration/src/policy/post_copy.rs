//! Post-copy (Hines and Gopalan 2009): the guest moves at once, with nothing but its CPU and device
//! state; each page follows once.

use super::{Decision, Policy, View};
use crate::options::Options;
use crate::order::PushOrder;

/// Post-copy.
#[derive(Debug)]
pub struct PostCopy {
    order: PushOrder,
}

impl PostCopy {
    /// With the push order of the options.
    #[must_use]
    pub const fn new(options: &Options) -> Self {
        Self {
            order: options.order,
        }
    }
}

impl Policy for PostCopy {
    fn name(&self) -> &'static str {
        "postcopy"
    }

    fn next(&mut self, _: &View<'_>) -> Decision {
        Decision::HandOver {
            order: self.order,
            why: format!(
                "post-copy moves the guest first; push order {}",
                self.order.name()
            ),
        }
    }

    fn hands_over(&self) -> bool {
        true
    }
}
