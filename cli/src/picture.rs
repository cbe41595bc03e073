//! `ferry migrate --html`: a migration as a file for a browser.

use super::outcome::Ended;
use ferry_agent::page::{View, file};
use ferry_migration::report::{Event, Report};
use ferry_terminal::output::{Failure, say};
use ferry_vmm::new_file::{Making, NewFile, NewFileError};
use std::io::Write;
use std::path::Path;

/// A file in the making, and what goes into it.
pub struct Picture {
    file: NewFile,
    view: View,
    begun: bool,
}

impl Picture {
    /// Before the migration begins: what would hinder the file then is said now.
    ///
    /// # Errors
    /// There is a file of that name, or none can be made.
    pub fn begin(path: &Path, guest: Option<String>, to: &str) -> Result<Self, NewFileError> {
        Ok(Self {
            file: NewFile::create(path, Making::default())?,
            view: View::new(guest, String::new(), Some(to.to_owned())),
            begun: false,
        })
    }

    /// Takes what the migration says.
    pub fn receive(&mut self, event: &Event) {
        self.begun = true;
        self.view.receive(event);
    }

    /// Makes the file, unless the migration has not begun. That it cannot be made changes nothing
    /// of how the migration ended.
    pub fn end(mut self, result: &Result<Report, Ended>) {
        if let Err(ended) = result {
            self.view.lose(ended.sentence.clone());
        }
        if self.begun
            && let Err(Failure(why)) = self.write()
        {
            say(&format!("the migration has no picture: {why}"));
        }
    }

    fn write(self) -> Result<(), Failure> {
        self.file.file().write_all(file(&self.view)?.as_bytes())?;
        Ok(self.file.publish()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::report::{Progress, Status};

    fn lost() -> Result<Report, Ended> {
        Err(Ended::from(Failure("the VMM went away".into())))
    }

    #[test]
    fn a_failed_migration_has_a_picture_and_one_that_did_not_begin_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let begin = |name: &str| Picture::begin(&dir.path().join(name), None, "tcp:b:1").unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();

        let mut failed = begin("failed.html");
        let report = Report::bare("s".into(), "auto".into(), Status::Failed, "no room".into());
        failed.receive(&Event::Report(Box::new(report.clone())));
        failed.end(&Ok(report));
        assert!(read("failed.html").contains("\"error\":\"no room\""));

        let mut broken = begin("broken.html");
        broken.receive(&Event::Progress(Progress::default()));
        broken.end(&lost());
        assert!(read("broken.html").contains("the VMM went away"));

        begin("none.html").end(&lost());
        let names = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(names, 2, "nothing else is left");
    }

    #[test]
    fn a_file_that_is_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.html");
        std::fs::write(&path, "mine").unwrap();
        let why = Picture::begin(&path, None, "x").err().unwrap().to_string();
        assert!(why.contains("exists already"), "{why}");
        let nowhere = dir.path().join("no/such.html");
        assert!(Picture::begin(&nowhere, None, "x").is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    }
}
