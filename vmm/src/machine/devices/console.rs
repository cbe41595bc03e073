//! What is behind a console: a writer for its output. Input comes by
//! [`Machine::console_input`](crate::machine::Machine::console_input).

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;

type Output = Box<dyn Write + Send>;

/// A console as it is given on a host.
#[derive(Clone)]
pub struct ConsoleOptions {
    output: Arc<dyn Fn() -> io::Result<Output> + Send + Sync>,
}

impl ConsoleOptions {
    /// One whose output goes to what `output` makes, for each machine that is built: a receiver
    /// builds another after one that failed. The writer must not block.
    #[must_use]
    pub fn new(output: impl Fn() -> io::Result<Output> + Send + Sync + 'static) -> Self {
        Self {
            output: Arc::new(output),
        }
    }

    pub(super) fn open(&self) -> io::Result<Output> {
        (self.output)()
    }
}

impl fmt::Debug for ConsoleOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConsoleOptions")
    }
}

impl PartialEq for ConsoleOptions {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.output, &other.output)
    }
}

impl Eq for ConsoleOptions {}
