//! Which guest a command is about: its name, or the control socket of its VMM.

use crate::names::{GuestName, NameError, RuntimeFolder};
use clap::builder::{OsStringValueParser, PathBufValueParser};
use clap::error::ErrorKind;
use clap::{Arg, ArgMatches, Command, Error};
use std::ffi::OsString;
use std::path::PathBuf;

const NAME: &str = "guest";
const API: &str = "api";
const WORD: &str = "word";
const NAME_HELP: &str = "The guest's name; `ferry ps` lists those that are there";
const API_HELP: &str = "The control socket of the guest's VMM, in place of the name";

/// A guest that a command is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guest {
    /// By its name.
    Named(GuestName),
    /// By its control socket.
    At(PathBuf),
}

impl Guest {
    /// As it stands on a command line.
    #[must_use]
    pub fn words(&self) -> Vec<String> {
        match self {
            Self::Named(name) => vec![name.to_string()],
            Self::At(path) => vec!["--api".to_owned(), path.display().to_string()],
        }
    }

    /// The control socket.
    ///
    /// # Errors
    /// No guest has that name.
    pub fn socket(&self) -> Result<PathBuf, NameError> {
        match self {
            Self::At(path) => Ok(path.clone()),
            Self::Named(name) => RuntimeFolder::find()?.existing(name),
        }
    }
}

/// What stands after the guest on a command line.
pub trait Word: Sized {
    /// Its name in the help.
    const VALUE: &'static str;
    /// Its help.
    const HELP: &'static str;

    /// From the word, if there is one.
    ///
    /// # Errors
    /// Why it cannot be meant, for people.
    fn read(word: Option<OsString>) -> Result<Self, String>;
}

/// `NAME WORD`, or `--api SOCKET WORD`. One parser for both forms: what the first word is depends
/// on whether `--api` is there, which clap cannot say.
#[derive(Clone, Debug)]
pub struct TargetAnd<W> {
    /// The guest.
    pub guest: Guest,
    /// What stands after it.
    pub word: W,
}

/// `NAME`, or `--api SOCKET`.
pub type Target = TargetAnd<Nothing>;

/// No word.
#[derive(Clone, Copy, Debug)]
pub struct Nothing;

impl Word for Nothing {
    const VALUE: &'static str = "";
    const HELP: &'static str = "";

    fn read(_: Option<OsString>) -> Result<Self, String> {
        Ok(Self)
    }
}

impl<W: Word> TargetAnd<W> {
    /// Its control socket.
    ///
    /// # Errors
    /// No guest has that name.
    pub fn socket(&self) -> Result<PathBuf, NameError> {
        self.guest.socket()
    }

    fn resolve(
        api: Option<PathBuf>,
        first: Option<OsString>,
        second: Option<OsString>,
    ) -> Result<Self, Error> {
        let error = |kind, text: String| Error::raw(kind, text + "\n");
        let read = |word: Option<OsString>| {
            let missing = word.is_none();
            W::read(word).map_err(|why| match missing {
                true => error(ErrorKind::MissingRequiredArgument, why),
                false => error(ErrorKind::ValueValidation, why),
            })
        };
        let conflict = |text: &str| error(ErrorKind::ArgumentConflict, text.into());
        match (api, first, second) {
            (Some(_), Some(_), None) if W::VALUE.is_empty() => {
                Err(conflict("NAME and --api both say which guest; give one"))
            }
            (Some(_), _, Some(_)) => Err(conflict("NAME and --api both say which guest; give one")),
            (Some(path), word, None) => Ok(Self {
                guest: Guest::At(path),
                word: read(word)?,
            }),
            (None, Some(first), second) => {
                // One word alone: the missing one is said first, as the word may be the other.
                let word = read(second)?;
                let name = first.to_string_lossy();
                let named = name.parse().map_err(|why| {
                    let text = format!("invalid value '{name}' for 'NAME': {why}");
                    error(ErrorKind::ValueValidation, text)
                })?;
                Ok(Self {
                    guest: Guest::Named(named),
                    word,
                })
            }
            (None, None, _) => Err(error(
                ErrorKind::MissingRequiredArgument,
                "which guest is missing; give its NAME (`ferry ps` lists them) or --api SOCKET"
                    .into(),
            )),
        }
    }
}

impl<W: Word> clap::FromArgMatches for TargetAnd<W> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let word = |id| matches.try_get_one::<OsString>(id).ok().flatten().cloned();
        Self::resolve(
            matches.get_one::<PathBuf>(API).cloned(),
            word(NAME),
            word(WORD),
        )
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl<W: Word> clap::Args for TargetAnd<W> {
    fn augment_args(command: Command) -> Command {
        let optional = W::read(None).is_ok();
        let word = match (W::VALUE, optional) {
            ("", _) => String::new(),
            (value, true) => format!(" [{value}]"),
            (value, false) => format!(" <{value}>"),
        };
        let usage = format!(
            "ferry {} [OPTIONS] <NAME|--api <SOCKET>>{word}",
            command.get_name()
        );
        let command = command
            .override_usage(usage)
            .arg(
                Arg::new(NAME)
                    .value_name("NAME")
                    .value_parser(OsStringValueParser::new())
                    .help(NAME_HELP),
            )
            .arg(
                Arg::new(API)
                    .long(API)
                    .value_name("SOCKET")
                    .value_parser(PathBufValueParser::new())
                    .help(API_HELP),
            );
        if W::VALUE.is_empty() {
            return command;
        }
        command.arg(
            Arg::new(WORD)
                .value_name(W::VALUE)
                .value_parser(OsStringValueParser::new())
                .help(W::HELP),
        )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// A word that is a file, `PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileToMake(pub PathBuf);

impl Word for FileToMake {
    const VALUE: &'static str = "PATH";
    const HELP: &'static str = "The file to make";

    fn read(word: Option<OsString>) -> Result<Self, String> {
        let word = word.filter(|word| !word.is_empty());
        word.map(|word| Self(word.into()))
            .ok_or_else(|| "which file to make is missing; give NAME PATH".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Plain {
        #[command(flatten)]
        target: Target,
        #[arg(long)]
        flag: bool,
    }

    #[derive(Debug, Parser)]
    struct WithFile {
        #[command(flatten)]
        target: TargetAnd<FileToMake>,
        #[arg(long)]
        flag: bool,
    }

    fn plain(line: &str) -> Result<Guest, String> {
        let read = Plain::try_parse_from(line.split(' '));
        read.map(|p| p.target.guest).map_err(|e| e.to_string())
    }

    fn with_file(line: &str) -> Result<(Guest, PathBuf), String> {
        let read = WithFile::try_parse_from(line.split(' '));
        read.map(|p| (p.target.guest, p.target.word.0))
            .map_err(|e| e.to_string())
    }

    fn web() -> Guest {
        Guest::Named("web".parse().unwrap())
    }

    #[test]
    fn a_guest_is_a_name_or_a_socket() {
        assert_eq!(plain("ferry web"), Ok(web()));
        assert_eq!(plain("ferry --flag web"), Ok(web()));
        assert_eq!(plain("ferry --api a/s"), Ok(Guest::At("a/s".into())));
        for (line, part) in [
            ("ferry", "give its NAME"),
            ("ferry web --api s", "give one"),
            ("ferry a/s", "1 to 64 letters"),
            ("ferry web db", "unexpected argument 'db'"),
        ] {
            let why = plain(line).unwrap_err();
            assert!(why.contains(part), "{line}: {why}");
        }
    }

    #[test]
    fn the_word_stands_after_the_guest_in_both_forms() {
        let named = Ok((web(), "f".into()));
        for line in [
            "ferry web f",
            "ferry --flag web f",
            "ferry web --flag f",
            "ferry web f --flag",
        ] {
            assert_eq!(with_file(line), named, "{line}");
        }
        let at = Ok((Guest::At("s".into()), "f".into()));
        for line in [
            "ferry --api s f",
            "ferry f --api s",
            "ferry f --flag --api s",
        ] {
            assert_eq!(with_file(line), at, "{line}");
        }
        for (line, part) in [
            ("ferry", "which guest is missing"),
            ("ferry web", "which file to make is missing"),
            ("ferry --api s", "which file to make is missing"),
            ("ferry web f --api s", "give one"),
        ] {
            let why = with_file(line).unwrap_err();
            assert!(why.contains(part), "{line}: {why}");
        }
    }

    #[test]
    fn usage_shows_both_forms() {
        let usage = |mut command: Command| command.render_usage().to_string();
        let file = usage(<WithFile as clap::CommandFactory>::command());
        assert!(file.ends_with("<NAME|--api <SOCKET>> <PATH>"), "{file}");
        let plain = usage(<Plain as clap::CommandFactory>::command());
        assert!(plain.ends_with("<NAME|--api <SOCKET>>"), "{plain}");
    }
}
