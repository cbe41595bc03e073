"use strict";
// The file of `ferry migrate --html`: its data stand in it.
{
  const view = JSON.parse(document.getElementById("data").textContent);
  const root = document.getElementById("migration");
  const show = () => ferryMigration.draw(root, view);
  new ResizeObserver(show).observe(root);
  show();
}
