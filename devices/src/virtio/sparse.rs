/// Keeps a log readable that a guest could fill: of what happens again and again, the 1st, 2nd,
/// 4th, 8th, … is told.
#[derive(Debug, Default)]
pub(crate) struct Sparse(u64);

impl Sparse {
    /// Counts one; how many it were by now, if this one is to be told.
    pub(crate) fn count(&mut self) -> Option<u64> {
        self.0 = self.0.saturating_add(1);
        self.0.is_power_of_two().then_some(self.0)
    }
}
