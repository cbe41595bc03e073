//! The modules of a crate use each other in one direction only, and so do the modules within one of
//! them: what a reader needs to understand one of them never leads back to it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

const PACKAGES: [&str; 3] = ["migration", "devices", "vmm"];

/// These are read as a whole: KVM's VM, its vCPUs, and the state that is read from and written to
/// both; and a machine with what it is built from.
const ONE_ROOM: [(&str, &str); 2] = [("vmm", "kvm"), ("vmm", "machine")];

#[test]
fn modules_form_no_circle() {
    for package in PACKAGES {
        let uses = uses(&files_in(&format!("{package}/src/")), &[]);
        assert!(uses.len() > 5, "{package}: {uses:?}");
        let circles = circles(&uses);
        assert!(circles.is_empty(), "{package}: {circles:#?}");
    }
}

#[test]
fn modules_within_a_module_form_no_circle() {
    let mut read = 0;
    let mut found = BTreeMap::new();
    for package in PACKAGES {
        for module in modules_of(&files_in(&format!("{package}/src/"))) {
            let files = files_in(&format!("{package}/src/{module}/"));
            let uses = uses(&files, &["crate", &module]);
            read += uses.len();
            found.insert((package, module), circles(&uses));
        }
    }
    found.retain(|_, circles| !circles.is_empty());
    for (package, module) in ONE_ROOM {
        let circles = found.remove(&(package, module.to_owned()));
        assert!(circles.is_some(), "{package}, {module}: none is left");
    }
    assert!(found.is_empty(), "{found:#?}");
    assert!(read > 100, "{read} uses");
}

/// The engines' modules hold what their parts have in common: they name what their parts name, and
/// no part names anything of theirs.
#[test]
fn the_parts_of_an_engine_use_each_other_and_not_the_whole() {
    for module in ["source", "destination"] {
        let files = files_in(&format!("migration/src/{module}/"));
        let modules = modules_of(&files);
        assert!(modules.len() > 10, "{module}: {modules:?}");
        for (path, code) in code_of(&files) {
            let depth = path.split('/').count();
            for name in named(&tokens(code), depth, &["crate", module]) {
                assert!(modules.contains(&name), "{module}/{path} uses {name}");
            }
        }
    }
}

/// The sources below a directory, by their paths from there.
fn files_in(directory: &str) -> BTreeMap<String, String> {
    let inside = |path: String| {
        let inside = path.strip_prefix(directory)?.to_owned();
        Some((
            inside,
            fs::read_to_string(super::root().join(path)).unwrap(),
        ))
    };
    super::sources().into_iter().filter_map(inside).collect()
}

/// The module that a file is of, or lies below.
fn top(path: &str) -> String {
    let first = path.split('/').next().unwrap_or_default();
    first.trim_end_matches(".rs").to_owned()
}

fn modules_of(files: &BTreeMap<String, String>) -> BTreeSet<String> {
    files.keys().map(|path| top(path)).collect()
}

/// What is no test, of files that are not the crate's root.
fn code_of(files: &BTreeMap<String, String>) -> impl Iterator<Item = (&str, &str)> {
    let is_code =
        |path: &str| !path.ends_with("tests.rs") && !path.contains("tests/") && path != "lib.rs";
    let files = files.iter().filter(move |(path, _)| is_code(path));
    files.map(|(path, text)| {
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        (path.as_str(), code)
    })
}

/// Which module uses which, and in which files.
type Uses = BTreeMap<(String, String), BTreeSet<String>>;

/// The uses between the modules of a crate, or of its module `root`, whose files are given by their
/// paths from there. Tests do not count.
fn uses(files: &BTreeMap<String, String>, root: &[&str]) -> Uses {
    let modules = modules_of(files);
    let mut uses = Uses::new();
    for (path, code) in code_of(files) {
        let depth = path.split('/').count();
        for to in named(&tokens(code), depth, root) {
            let from = top(path);
            if to != from && modules.contains(&to) {
                uses.entry((from, to)).or_default().insert(path.to_owned());
            }
        }
    }
    uses
}

/// The uses that are part of circles: what is left when modules that use none of the others, or
/// are used by none of them, are taken away until there is no such module.
fn circles(uses: &Uses) -> Uses {
    let mut left = uses.clone();
    loop {
        let from: BTreeSet<_> = left.keys().map(|(from, _)| from.clone()).collect();
        let to: BTreeSet<_> = left.keys().map(|(_, to)| to.clone()).collect();
        let before = left.len();
        left.retain(|(a, b), _| to.contains(a) && from.contains(b));
        if left.len() == before {
            return left;
        }
    }
}

/// Names, `::`, braces and commas of code; all else is one `;`. Comments and texts are left out.
fn tokens(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = code;
    while let Some(c) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if c == '"' {
            text_length(rest)
        } else if rest.starts_with("'\"'") {
            3
        } else if c.is_alphanumeric() || c == '_' {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
            let end = end.unwrap_or(rest.len());
            found.push(rest[..end].to_owned());
            end
        } else if rest.starts_with("::") {
            found.push("::".to_owned());
            2
        } else {
            match c {
                '{' | '}' | ',' => found.push(c.to_string()),
                _ if c.is_whitespace() => {}
                _ => found.push(";".to_owned()),
            }
            c.len_utf8()
        };
        rest = &rest[length..];
    }
    found
}

/// How long a text in quotation marks is, which `rest` begins with.
fn text_length(rest: &str) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            '"' if !escaped => return at + 1,
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    rest.len()
}

/// The names below `root` (empty for the crate) that code reaches by its path and, from a file that
/// lies `depth` modules deeper, by `super::`.
fn named(tokens: &[String], depth: usize, root: &[&str]) -> BTreeSet<String> {
    let root = if root.is_empty() { &["crate"] } else { root };
    let mut found = BTreeSet::new();
    let is = |at: usize, token: &str| tokens.get(at).is_some_and(|found| found == token);
    let mut at = 0;
    while at < tokens.len() {
        let mut climbed = 0;
        let mut end = at;
        let mut path = root.iter().enumerate();
        if path.all(|(n, name)| is(at + 2 * n, name) && is(at + 2 * n + 1, "::")) {
            (climbed, end) = (depth, at + 2 * root.len());
        }
        while is(end, "super") && is(end + 1, "::") {
            climbed += 1;
            end += 2;
        }
        if climbed == depth {
            firsts(&tokens[end..], &mut found);
        }
        at = end.max(at + 1);
    }
    found
}

/// The first names of a tree of names: of `a::B` it is `a`, of `{a::{B, C}, d}` those are `a` and
/// `d`.
fn firsts(tree: &[String], found: &mut BTreeSet<String>) {
    let mut open = 0_usize;
    let mut first = true;
    for token in tree {
        match token.as_str() {
            "{" => open += 1,
            "}" => open = open.saturating_sub(1),
            "," if open == 1 => first = true,
            ";" => return,
            name => {
                if first {
                    found.insert(name.to_owned());
                    first = false;
                }
            }
        }
        if open == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<(String, String)> {
        let files = files
            .iter()
            .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()))
            .collect();
        circles(&uses(&files, &[])).into_keys().collect()
    }

    fn pair(from: &str, to: &str) -> (String, String) {
        (from.to_owned(), to.to_owned())
    }

    #[test]
    fn a_circle_is_found_however_a_module_is_named() {
        let crate_circle = [
            ("lib.rs", "mod a; mod b; mod c; mod leaf;"),
            ("a.rs", "use crate::{leaf, b::{X, Y}};"),
            ("b/deep.rs", "use super::super::c::Z;"),
            ("c.rs", "fn f() { \"a // text\"; crate::a::f(); }"),
            ("leaf.rs", "pub struct Leaf;"),
        ];
        assert_eq!(
            found(&crate_circle),
            [pair("a", "b"), pair("b", "c"), pair("c", "a")]
        );
        let two = [
            ("a.rs", "use super::b;"),
            ("b.rs", "use std::mem;\nuse crate::a::{self, T};"),
            ("c.rs", "use crate::b;"),
        ];
        assert_eq!(found(&two), [pair("a", "b"), pair("b", "a")]);
    }

    #[test]
    fn comments_tests_and_a_modules_own_parts_are_no_circle() {
        let files = [
            ("a.rs", "mod part;\nuse crate::b::X;\nuse self::part::P;"),
            (
                "a/part.rs",
                "use super::Q;\nuse crate::a::R;\nuse super::b_of_a;",
            ),
            (
                "b.rs",
                "//! See [`crate::a`].\nconst A: &str = \"crate::a\";\n#[cfg(test)]\nmod tests {\n    \
                 use crate::a::X;\n}\n",
            ),
            ("b/tests.rs", "use crate::a;"),
        ];
        assert_eq!(found(&files), []);
    }

    #[test]
    fn within_a_module_names_above_it_do_not_count() {
        let files = [
            ("one.rs", "use super::two::X;\nuse crate::one::Y;"),
            ("two.rs", "use super::super::one::Z;"),
            ("two/deep.rs", "use crate::whole::one::W;\nuse super::Own;"),
        ];
        let files = files.map(|(path, text)| (path.to_owned(), text.to_owned()));
        let found = circles(&uses(&files.into(), &["crate", "whole"]));
        let found: Vec<_> = found.into_keys().collect();
        assert_eq!(found, [pair("one", "two"), pair("two", "one")]);
    }
}
