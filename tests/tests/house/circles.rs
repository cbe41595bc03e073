//! The top-level modules of a crate use each other in one direction only: what a reader needs to
//! understand one of them never leads back to it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

#[test]
fn modules_form_no_circle() {
    for package in ["migration", "devices", "vmm"] {
        let files = super::sources()
            .into_iter()
            .filter_map(|path| {
                let inside = path.strip_prefix(&format!("{package}/src/"))?.to_owned();
                Some((
                    inside,
                    fs::read_to_string(super::root().join(path)).unwrap(),
                ))
            })
            .collect();
        let uses = uses(&files);
        assert!(uses.len() > 5, "{package}: {uses:?}");
        let circles = circles(&uses);
        assert!(circles.is_empty(), "{package}: {circles:#?}");
    }
}

/// Which top-level module uses which, and in which files.
type Uses = BTreeMap<(String, String), BTreeSet<String>>;

/// The uses between the top-level modules of a crate, whose files are given by their paths below
/// `src/`. Tests do not count.
fn uses(files: &BTreeMap<String, String>) -> Uses {
    let top = |path: &str| {
        let first = path.split('/').next().unwrap_or_default();
        first.trim_end_matches(".rs").to_owned()
    };
    let modules: BTreeSet<String> = files.keys().map(|path| top(path)).collect();
    let mut uses = Uses::new();
    for (path, text) in files {
        let is_test = path.ends_with("tests.rs") || path.contains("tests/");
        if is_test || path == "lib.rs" {
            continue;
        }
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        let depth = path.split('/').count();
        for to in named(&tokens(code), depth) {
            let from = top(path);
            if to != from && modules.contains(&to) {
                uses.entry((from, to)).or_default().insert(path.clone());
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

/// The top-level names that code reaches by `crate::` and, from a file that lies `depth` modules
/// deep, by `super::`.
fn named(tokens: &[String], depth: usize) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let is = |at: usize, token: &str| tokens.get(at).is_some_and(|found| found == token);
    let mut at = 0;
    while at < tokens.len() {
        let mut climbed = 0;
        let mut end = at;
        if is(at, "crate") && is(at + 1, "::") {
            (climbed, end) = (depth, at + 2);
        }
        while is(end, "super") && is(end + 1, "::") {
            climbed += 1;
            end += 2;
        }
        if climbed >= depth {
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
        circles(&uses(&files)).into_keys().collect()
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
}
