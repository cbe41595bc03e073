//! A page to look at: migrations drawn by a browser. One drawing code (`agent/page/migration.js`)
//! draws the agent's page and the file of `ferry migrate --html`, from the same JSON: a [`View`].

mod file;
mod scene;
pub(crate) mod server;
mod view;
mod watch;

pub use file::file;
pub use view::{Sample, View};

/// Draws a migration.
const MIGRATION_JS: &str = include_str!("../page/migration.js");
/// How all of it looks.
const STYLE_CSS: &str = include_str!("../page/style.css");
