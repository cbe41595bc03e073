//! Guest files: the options of `ferry run` as TOML.
//!
//! The keys are the long options of `ferry run`, as its own definition lists them: a new option is
//! a new key. A file becomes options on the command line before that is read, so that both have one
//! reader. A flag beside the file drops the file's value, and those values that the flag excludes.

use super::outcome::Ended;
use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use ferry_terminal::output::Failure;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write;
use std::fs;
use std::ops::Range;
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// The command that takes a guest file, and its arguments that are no keys.
const RUN: &str = "run";
const FILE: &str = "file";
const PRINT: &str = "print_config";
/// A file that is larger is no guest file.
const MAX_FILE: u64 = 1 << 20;
/// How alike a key and an option must be for the option to be meant; clap's own measure.
const ALIKE: f64 = 0.7;

/// A command line, with a guest file's options in it.
#[derive(Debug)]
pub struct Line {
    /// The arguments, the program's name first.
    pub args: Vec<OsString>,
    options: Vec<FileOption>,
}

/// An option that a file gives.
#[derive(Debug)]
struct FileOption {
    long: String,
    /// `None` where the option takes none.
    value: Option<String>,
    /// `FILE:LINE:COLUMN`.
    place: String,
}

/// Puts the options of a guest file in its place, if the command line names one.
pub fn expand(definition: &Command, mut args: Vec<OsString>) -> Result<Line, Ended> {
    // What is wrong with the command line is said when it is read in earnest: here a wrong value is
    // a value.
    let any = |arg: Arg| match arg.get_action().takes_values() {
        true => arg.value_parser(clap::value_parser!(OsString)),
        false => arg,
    };
    let read = definition.clone().ignore_errors(true);
    let read = read.mut_subcommand(RUN, |run| run.mut_args(any));
    let given = read.try_get_matches_from(&args).ok();
    let given = given.as_ref().and_then(|matches| matches.subcommand());
    let run = definition.find_subcommand(RUN);
    let (Some((RUN, given)), Some(run)) = (given, run) else {
        return Ok(Line::plain(args));
    };
    let Ok(Some(path)) = given.try_get_one::<OsString>(FILE) else {
        return Ok(Line::plain(args));
    };
    let path = Path::new(path);
    // How many values an option takes, and which options exclude which, is known of a command that
    // is built.
    let mut run = run.clone();
    run.build();
    let mut options = options(&run, path, &text(path)?)?;
    let dropped = dropped(&run, given);
    options.retain(|option| !dropped.contains(&option.long));
    let after = args
        .iter()
        .position(|arg| arg == RUN)
        .map_or(1, |at| at + 1);
    let inserted = options.iter().map(|option| match &option.value {
        Some(value) => format!("--{}={value}", option.long).into(),
        None => format!("--{}", option.long).into(),
    });
    args.splice(after..after, inserted.collect::<Vec<OsString>>());
    Ok(Line { args, options })
}

impl Line {
    fn plain(args: Vec<OsString>) -> Self {
        Self {
            args,
            options: Vec::new(),
        }
    }

    /// Where in the guest file the cause of this error is, if it is there.
    pub fn place(&self, error: &clap::Error) -> Option<&str> {
        let context = |kind| match error.get(kind) {
            Some(ContextValue::String(text)) => vec![text.clone()],
            Some(ContextValue::Strings(all)) => all.clone(),
            _ => Vec::new(),
        };
        let shown = [
            context(ContextKind::InvalidArg),
            context(ContextKind::PriorArg),
        ];
        let value = context(ContextKind::InvalidValue);
        let longs = shown.iter().flatten().filter_map(|text| {
            let text = text.strip_prefix("--")?;
            text.split([' ', '=', '[']).next()
        });
        for long in longs {
            let mut same = self.options.iter().filter(|option| option.long == long);
            let exact = same.clone().find(|o| value.first() == o.value.as_ref());
            if let Some(found) = exact.or_else(|| same.next()) {
                return Some(&found.place);
            }
        }
        None
    }
}

fn text(path: &Path) -> Result<String, Ended> {
    let failed = |why: &dyn std::fmt::Display| {
        Failure(format!(
            "the guest file {} cannot be read ({why}); `ferry run … --print-config` writes one",
            path.display()
        ))
    };
    let size = fs::metadata(path).map_err(|e| failed(&e))?.len();
    if size > MAX_FILE {
        return Err(failed(&"it is larger than 1 MiB").into());
    }
    Ok(fs::read_to_string(path).map_err(|e| failed(&e))?)
}

/// What may be a key.
fn keys(run: &Command) -> impl Iterator<Item = (&Arg, &str)> {
    let known = |arg: &&Arg| {
        let own = ![FILE, PRINT].contains(&arg.get_id().as_str());
        own && !arg.is_hide_set() && !arg.is_global_set()
    };
    let options = run.get_arguments().filter(known);
    let options = options.filter_map(|arg| Some((arg, arg.get_long()?)));
    options.filter(|(arg, _)| is_switch(arg) || arg.get_action().takes_values())
}

fn is_switch(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue)
}

/// The keys that the command line decides: those that it gives, and those that these exclude.
fn dropped(run: &Command, given: &ArgMatches) -> BTreeSet<String> {
    let is_given = |id: &str| {
        matches!(given.try_contains_id(id), Ok(true))
            && given.value_source(id) == Some(ValueSource::CommandLine)
    };
    let alternatives: Vec<Vec<&str>> = run
        .get_groups()
        .filter(|group| !(*group).clone().is_multiple())
        .map(|group| group.get_args().map(clap::Id::as_str).collect())
        .collect();
    let excludes = |one: &Arg, other: &Arg| {
        let stated = run.get_arg_conflicts_with(one);
        let grouped = |all: &Vec<&str>| {
            [one, other]
                .iter()
                .all(|a| all.contains(&a.get_id().as_str()))
        };
        stated.iter().any(|arg| arg.get_id() == other.get_id()) || alternatives.iter().any(grouped)
    };
    let decided = |arg: &Arg| {
        keys(run).any(|(other, _)| {
            is_given(other.get_id().as_str())
                && (arg.get_id() == other.get_id() || excludes(arg, other) || excludes(other, arg))
        })
    };
    keys(run)
        .filter(|(arg, _)| decided(arg))
        .map(|(_, long)| long.to_owned())
        .collect()
}

/// The options that a file gives.
fn options(run: &Command, path: &Path, text: &str) -> Result<Vec<FileOption>, Ended> {
    let place = |span: Range<usize>| {
        let before = text.get(..span.start).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().map_or(0, |l| l.chars().count()) + 1;
        format!("{}:{line}:{column}", path.display())
    };
    let wrong = |span, what: &str| Ended::usage(format!("{}: {what}", place(span)));
    let table = DeTable::parse(text).map_err(|e| {
        let what = e.message().split_whitespace().collect::<Vec<_>>().join(" ");
        wrong(e.span().unwrap_or_default(), &what)
    })?;
    let mut found = Vec::new();
    for (key, value) in table.get_ref() {
        let name = key.get_ref().as_ref();
        let Some((arg, long)) = keys(run).find(|(_, long)| *long == name) else {
            return Err(wrong(key.span(), &unknown(run, name)));
        };
        let mut add = |value: Option<String>, span| {
            found.push(FileOption {
                long: long.to_owned(),
                value,
                place: place(span),
            });
        };
        let form = || format!("`{name}` takes {}", form(arg));
        let no_value = arg.get_num_args().is_some_and(|n| n.min_values() == 0);
        match value.get_ref() {
            DeValue::Boolean(on) if no_value => {
                if *on {
                    add(None, value.span());
                }
            }
            _ if is_switch(arg) => return Err(wrong(value.span(), &form())),
            DeValue::Array(all) if matches!(arg.get_action(), ArgAction::Append) => {
                for one in all.iter() {
                    let Some(text) = scalar(one.get_ref()) else {
                        return Err(wrong(one.span(), &form()));
                    };
                    add(Some(text), one.span());
                }
            }
            other => match scalar(other) {
                Some(text) => add(Some(text), value.span()),
                None => return Err(wrong(value.span(), &form())),
            },
        }
    }
    found.sort_by_key(|option| {
        // In the order of the help, so that the last word of clap does not depend on the alphabet.
        keys(run).position(|(_, long)| long == option.long)
    });
    Ok(found)
}

/// A value as it would stand on the command line.
fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::Float(number) => Some(number.to_string()),
        _ => None,
    }
}

/// What a key takes, for people.
fn form(arg: &Arg) -> String {
    let names = arg.get_value_names().unwrap_or_default();
    let value = names.first().map_or("a value", |name| name.as_str());
    match arg.get_action() {
        ArgAction::SetTrue => "true or false".into(),
        ArgAction::Append => format!("a list of texts, each {value}"),
        _ => format!("one text or number: {value}"),
    }
}

fn unknown(run: &Command, name: &str) -> String {
    let alike = keys(run)
        .map(|(_, long)| (strsim::jaro_winkler(name, long), long))
        .filter(|(measure, _)| *measure > ALIKE)
        .max_by(|one, other| one.0.total_cmp(&other.0));
    match alike {
        Some((_, long)) => format!("there is no key `{name}`; is `{long}` meant?"),
        None => format!(
            "there is no key `{name}`; the options that `ferry run --help` lists are the keys, without their dashes"
        ),
    }
}

/// The guest file that says what this command line says, if it asks for one.
pub fn printed(definition: &Command, matches: &ArgMatches) -> Result<Option<String>, Ended> {
    let (Some((RUN, given)), Some(run)) = (matches.subcommand(), definition.find_subcommand(RUN))
    else {
        return Ok(None);
    };
    if !given.get_flag(PRINT) {
        return Ok(None);
    }
    let mut text = String::from("# A guest of `ferry run FILE`. Lines with # have the defaults.\n");
    let mut heading = None;
    let mut all: Vec<_> = keys(run).collect();
    // The help shows them by their headings, too.
    let headings: Vec<_> = all.iter().map(|(arg, _)| arg.get_help_heading()).collect();
    all.sort_by_key(|(arg, _)| headings.iter().position(|h| *h == arg.get_help_heading()));
    for (arg, long) in all {
        if heading != Some(arg.get_help_heading()) {
            heading = Some(arg.get_help_heading());
            let _ = writeln!(text, "\n# {}", arg.get_help_heading().unwrap_or("Other"));
        }
        let id = arg.get_id().as_str();
        let is_given = given.value_source(id) == Some(ValueSource::CommandLine);
        let mark = if is_given { "" } else { "# " };
        let value = match (is_given, is_switch(arg)) {
            (on, true) => on.to_string(),
            (true, false) => values(arg, given.get_raw(id).into_iter().flatten())?,
            (false, false) => values(arg, example(arg).iter().map(OsString::as_os_str))?,
        };
        let _ = writeln!(text, "{mark}{long} = {value}");
    }
    Ok(Some(text))
}

/// Its default, or what its help calls its value.
fn example(arg: &Arg) -> Vec<OsString> {
    let defaults = arg.get_default_values();
    if !defaults.is_empty() {
        return defaults.iter().map(|value| value.into()).collect();
    }
    let names = arg.get_value_names().unwrap_or_default();
    names.iter().map(|name| name.as_str().into()).collect()
}

/// As TOML.
fn values<'a>(arg: &Arg, raw: impl Iterator<Item = &'a std::ffi::OsStr>) -> Result<String, Ended> {
    let one = |raw: &std::ffi::OsStr| {
        let Some(text) = raw.to_str() else {
            let sentence = format!("{} is no UTF-8, which a guest file is", raw.display());
            return Err(Ended::from(Failure(sentence)));
        };
        let number = text.parse::<u32>().ok();
        let number = number.filter(|number| number.to_string() == text);
        Ok(match number {
            Some(number) => number.to_string(),
            None => toml::Value::String(text.to_owned()).to_string(),
        })
    };
    let all: Vec<String> = raw.map(one).collect::<Result<_, _>>()?;
    Ok(match arg.get_action() {
        ArgAction::Append => format!("[{}]", all.join(", ")),
        _ => all.concat(),
    })
}

#[cfg(test)]
mod tests;
