// SPDX-License-Identifier: Apache-2.0
// Reads a chosen file into its text field. Keeps a page live: asks for it every second and puts in place the parts ([data-live]) that changed. The server
// escapes every value, and the policy of the page lets no script run but this file.
"use strict";

(() => {
  for (const chooser of document.querySelectorAll("input[type=file][data-into]")) {
    chooser.hidden = false; // of no use without a script
    chooser.addEventListener("change", async () => {
      if (chooser.files.length) document.getElementById(chooser.dataset.into).value = await chooser.files[0].text();
    });
  }
  if (!document.body.hasAttribute("data-poll")) return;
  const EVERY = 1000, SLOWEST = 8000;
  const seen = new Map(); // what the server sent last, by id: focus and open details must not count as changes
  let tag = "", pause = EVERY, last = new Date();

  for (const part of document.querySelectorAll("[data-live]")) seen.set(part.id, part.outerHTML);

  function keyOf(element) {
    if (!element) return null;
    if (element.id) return "#" + CSS.escape(element.id);
    const href = element.getAttribute("href");
    return href ? `a[href="${CSS.escape(href)}"]` : element.localName;
  }

  function place(fresh) {
    const old = document.getElementById(fresh.id);
    if (!old || seen.get(fresh.id) === fresh.outerHTML) return;
    seen.set(fresh.id, fresh.outerHTML);
    const focused = old.contains(document.activeElement) ? keyOf(document.activeElement) : null;
    const open = [...old.querySelectorAll("details[open][id]")].map((element) => element.id);
    const left = [...old.querySelectorAll(".scroll")].map((element) => element.scrollLeft);
    const typed = [...old.querySelectorAll("input[id]")].map((element) => [element.id, element.value]);
    const part = document.adoptNode(fresh);
    old.replaceWith(part);
    for (const [id, value] of typed) {
      const field = document.getElementById(id);
      if (field && part.contains(field)) field.value = value;
    }
    part.querySelectorAll(".scroll").forEach((element, index) => { element.scrollLeft = left[index] || 0; });
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    if (focused) part.querySelector(focused)?.focus({ preventScroll: true });
    const words = part.dataset.say;
    if (words) document.getElementById("say").textContent = words;
  }

  function answered(yes) {
    if (yes) last = new Date();
    document.getElementById("link").hidden = yes;
    document.getElementById("link-since").textContent = last.toLocaleTimeString();
    pause = yes ? EVERY : Math.min(SLOWEST, pause * 2);
  }

  async function look() {
    try {
      const response = await fetch(location.href, {
        headers: tag ? { "If-None-Match": tag } : {}, redirect: "manual", signal: AbortSignal.timeout(10000),
      });
      if (response.type === "opaqueredirect") return location.reload(); // to the login
      if (response.status !== 304 && !response.ok) throw new Error(String(response.status));
      if (response.ok) {
        const page = new DOMParser().parseFromString(await response.text(), "text/html");
        tag = response.headers.get("ETag") || "";
        document.title = page.title;
        page.querySelectorAll("[data-live]").forEach(place);
      }
      answered(true);
    } catch {
      answered(false);
    }
    setTimeout(again, pause);
  }

  function again() {
    if (document.hidden) document.addEventListener("visibilitychange", look, { once: true });
    else look();
  }

  setTimeout(again, EVERY);
})();
