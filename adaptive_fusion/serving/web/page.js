// Mends what Gradio's options do not reach, and the button that forgets the key.
(() => {
  const each = (selector, change) => document.querySelectorAll(selector).forEach(change);
  const set = (element, name, value) => {
    if (element.getAttribute(name) !== value) element.setAttribute(name, value);
  };
  const mend = () => {
    // A list item without a list.
    each('.thumbnail-wrapper[role="listitem"]', (wrapper) => set(wrapper, "role", "group"));
    // A name that is not the text that is seen.
    each(".submit-button, button.upload-container", (button) => button.innerText.trim() && set(button, "aria-label", button.innerText.trim().replace(/\s+/g, " ")));
    // Images that open when pressed, without a name.
    each(".image-container > button", (button) => {
      const image = button.querySelector("img");
      if (image) set(button, "aria-label", image.alt || decodeURIComponent(image.src.split("/").pop()));
    });
    // The page's language, which Gradio takes to be the browser's.
    const language = document.querySelector('meta[name="af-language"]');
    if (language) set(document.documentElement, "lang", language.content);
    const key = document.querySelector('meta[name="af-key"]');
    const leave = document.getElementById("leave");
    if (leave && key && key.content === "yes") leave.hidden = false;
  };
  let waiting = false;
  new MutationObserver(() => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      mend();
    });
  }).observe(document, { childList: true, subtree: true, attributeFilter: ["lang", "aria-label"] });
})();
