//! When a machine reached the stages of its start. `ferry bench boot` asks `ferry run` for it with
//! a hidden option.

use crate::output::Failure;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A stage's name, and when it was reached: nanoseconds of the clock that all processes of this
/// host share.
pub type Mark = (String, u64);

/// Marks being taken; without a file, none are.
#[derive(Debug)]
pub struct Timeline {
    path: Option<PathBuf>,
    marks: Vec<Mark>,
}

impl Timeline {
    /// One that is to be written to `path`.
    pub fn new(path: Option<&Path>) -> Self {
        Self {
            path: path.map(Path::to_owned),
            marks: Vec::new(),
        }
    }

    /// The stage is reached.
    pub fn mark(&mut self, stage: &str) {
        self.mark_at(stage, Instant::now());
    }

    /// The stage was reached at that time.
    pub fn mark_at(&mut self, stage: &str, at: Instant) {
        if self.path.is_some() {
            self.marks.push((stage.to_owned(), nanos(at)));
        }
    }

    /// Whether there is a file to write.
    pub fn is_wanted(&self) -> bool {
        self.path.is_some()
    }

    /// Writes it down.
    pub fn write(&self) -> Result<(), Failure> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        let failed = |e| {
            Failure(format!(
                "{} cannot be written ({e}); choose another file",
                path.display()
            ))
        };
        std::fs::write(path, serde_json::to_vec(&self.marks)?).map_err(failed)
    }

    /// What another process has written down.
    pub fn read(path: &Path) -> Result<Vec<Mark>, Failure> {
        let failed = |e| Failure(format!("{} cannot be read ({e})", path.display()));
        Ok(serde_json::from_slice(
            &std::fs::read(path).map_err(failed)?,
        )?)
    }
}

/// An instant in nanoseconds of CLOCK_MONOTONIC, which `Instant` reads but does not show.
pub fn nanos(at: Instant) -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now = Duration::try_from(now).unwrap_or_default();
    let at = now.saturating_sub(at.elapsed());
    u64::try_from(at.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_read_as_they_were_written_and_in_order() {
        let path = std::env::temp_dir().join(format!("ferry-timeline-{}", std::process::id()));
        let earlier = Instant::now() - Duration::from_secs(10);
        let mut timeline = Timeline::new(Some(&path));
        timeline.mark("b");
        timeline.mark_at("a", earlier);
        timeline.write().unwrap();
        let marks = Timeline::read(&path).unwrap();
        assert_eq!(marks, timeline.marks);
        assert!(marks[1].1 <= marks[0].1, "{marks:?}");
        std::fs::write(&path, "[").unwrap();
        assert!(Timeline::read(&path).is_err());
        std::fs::remove_file(&path).unwrap();
        let mut unwanted = Timeline::new(None);
        unwanted.mark("a");
        assert!(unwanted.marks.is_empty() && unwanted.write().is_ok());
    }
}
