//! What a writer says that its reader must understand.

/// Characters of a sender's words that are told.
const QUOTED: usize = 200;

/// The names of `requires` that are not `known`, for a message; `None` when all are.
pub(super) fn unknown(requires: &[String], known: &[&str]) -> Option<String> {
    let unknown = requires.iter().map(String::as_str);
    let unknown: Vec<&str> = unknown.filter(|name| !known.contains(name)).collect();
    (!unknown.is_empty()).then(|| quoted(&unknown.join(", ")))
}

/// A sender's words, harmless on a terminal.
pub(super) fn quoted(text: &str) -> String {
    let harmless = text.chars().map(|c| if c.is_control() { '?' } else { c });
    harmless.take(QUOTED).collect()
}
