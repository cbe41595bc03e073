use super::*;
use crate::Cli;
use clap::{CommandFactory, Parser};
use std::path::PathBuf;

struct File {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl File {
    fn new(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.toml");
        fs::write(&path, text).unwrap();
        Self { _dir: dir, path }
    }

    /// The command line that `ferry run FILE …` becomes, from behind `run`, without the file.
    fn line(&self, more: &[&str]) -> Result<Vec<String>, String> {
        let line = self.expand(more).map_err(|e| e.sentence)?;
        let text = |arg: OsString| arg.into_string().unwrap();
        let mut args: Vec<_> = line.args.into_iter().map(text).collect();
        args.retain(|arg| *arg != self.path.to_str().unwrap());
        Ok(args.split_off(2))
    }

    fn expand(&self, more: &[&str]) -> Result<Line, Ended> {
        let fixed = ["ferry", "run", self.path.to_str().unwrap()];
        let args = fixed.iter().chain(more).map(OsString::from).collect();
        expand(&Cli::command(), args)
    }

    /// Where the error is that reading it gives, from behind the folder.
    fn place(&self, more: &[&str]) -> String {
        let line = self.expand(more).unwrap();
        let error = Cli::try_parse_from(&line.args).unwrap_err();
        let place = line.place(&error).unwrap_or("nowhere");
        place.rsplit('/').next().unwrap().to_owned()
    }
}

const WEB: &str = "# a guest\nnas = \"mg.A\"\ncpus = 2\ndisk = [\"a.img\", \"b.img,ro\"]\nballoon = true\nhugepages = false\n";

#[test]
fn a_file_becomes_the_options_that_it_names() {
    let line = File::new(WEB).line(&[]).unwrap();
    let options = [
        "--nas=mg.A",
        "--cpus=2",
        "--disk=a.img",
        "--disk=b.img,ro",
        "--balloon",
    ];
    assert_eq!(line, options);
    let balloon = File::new("nas = 'mg.A'\nballoon = 'auto'").line(&[]);
    assert_eq!(balloon.unwrap(), ["--nas=mg.A", "--balloon=auto"]);
}

#[test]
fn flags_beside_the_file_win_and_drop_what_they_exclude() {
    let file = File::new(WEB);
    let line = file.line(&["--cpus", "4", "--disk", "c.img"]).unwrap();
    assert_eq!(
        line,
        ["--nas=mg.A", "--balloon", "--cpus", "4", "--disk", "c.img"]
    );
    let linux = File::new("kernel = 'k'\nmemory = '1G'\ncmdline = 'quiet'\nmemory-backing = '4k'");
    let line = linux.line(&["--nas", "is.S", "--hugepages"]).unwrap();
    assert_eq!(line, ["--memory=1G", "--nas", "is.S", "--hugepages"]);
}

#[test]
fn what_is_wrong_has_its_line_and_column() {
    for (text, expected) in [
        (
            "nas = 'mg.A'\nmemry = '1G'",
            "2:1: there is no key `memry`; is `memory` meant?",
        ),
        (
            "memory_backing = '4k'",
            "1:1: there is no key `memory_backing`; is `memory-backing` meant?",
        ),
        ("zzz = 1", "1:1: there is no key `zzz`; the options"),
        ("timeline = 'x'", "1:1: there is no key `timeline`"),
        ("print-config = true", "1:1: there is no key `print-config`"),
        ("cpus = [1]", "1:8: `cpus` takes one text or number: N"),
        ("hugepages = 'yes'", "1:13: `hugepages` takes true or false"),
        (
            "disk = ['a', [1]]",
            "1:14: `disk` takes a list of texts, each PATH|fd:N[,ro]",
        ),
        ("cpus = true", "1:8: `cpus` takes"),
        ("[machine]\ncpus = 1", "`machine`"),
        ("cpus = 1\ncpus = 2", "2:1: duplicate key"),
        ("cpus = ", "1:8: "),
    ] {
        let why = File::new(text).line(&[]).unwrap_err();
        let why = why.rsplit_once("web.toml:").unwrap().1;
        assert!(why.contains(expected), "{text:?}: {why}");
    }
    // What the option's own reader refuses.
    let file = File::new("nas = 'mg.A'\nmemory = 'lots'\ndisk = ['a.img',\n  ',ro']");
    assert_eq!(file.place(&[]), "web.toml:2:10");
    assert_eq!(file.place(&["--memory", "1G"]), "web.toml:4:3");
    assert_eq!(file.place(&["--memory", "many", "--disk=a"]), "nowhere");
    assert_eq!(
        File::new("kernel = 'k'\nnas = 'mg.A'").place(&[]),
        "web.toml:1:10"
    );
}

#[test]
fn a_file_that_is_not_there_is_said() {
    let args = ["ferry", "run", "/nonexistent/web.toml"].map(OsString::from);
    let why = expand(&Cli::command(), args.into()).unwrap_err();
    assert_eq!(why.outcome.status, 1);
    assert!(
        why.sentence
            .contains("/nonexistent/web.toml cannot be read")
    );
}

#[test]
fn other_commands_are_left_as_they_are() {
    for args in [
        &["ferry", "status", "web"][..],
        &["ferry", "run", "--nas", "mg.A"],
        &["ferry", "nonsense"],
    ] {
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        assert_eq!(expand(&Cli::command(), args.clone()).unwrap().args, args);
    }
}

#[test]
fn a_printed_file_says_what_the_command_line_said() {
    let said = [
        "ferry",
        "run",
        "--kernel",
        "a \"b\"",
        "--memory",
        "1G",
        "--cpus",
        "2",
        "--disk",
        "a.img",
        "--balloon",
        "--memory-prealloc",
        "--name",
        "7",
        "--print-config",
    ];
    let definition = Cli::command();
    let matches = definition.clone().try_get_matches_from(said).unwrap();
    let text = printed(&definition, &matches).unwrap().unwrap();
    for line in [
        "\n# Guest\n",
        "\nkernel = 'a \"b\"'\n",
        "\ncpus = 2\n",
        "\nname = 7\n",
        "\ndisk = [\"a.img\"]\n",
        "\nmemory-prealloc = true\n",
        "\n# hugepages = false\n",
        "\n# serial = \"stdio\"\n",
        "\n# initrd = \"PATH\"\n",
    ] {
        assert!(text.contains(line), "{line:?} is not in {text}");
    }
    let file = File::new(&text);
    let mut line = file.line(&[]).unwrap();
    line.sort();
    assert_eq!(
        line,
        [
            "--balloon=on",
            "--cpus=2",
            "--disk=a.img",
            "--kernel=a \"b\"",
            "--memory-prealloc",
            "--memory=1G",
            "--name=7",
        ]
    );
    let plain = definition
        .clone()
        .try_get_matches_from(["ferry", "ps"])
        .unwrap();
    assert!(printed(&definition, &plain).unwrap().is_none());
}
