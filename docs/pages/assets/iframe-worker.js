/* Pages that are opened as files may not start workers, and the site's search runs in one. Here a hidden frame, which
   runs in the page's own thread, takes the worker's place. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #frame = document.createElement("iframe");
    #waiting = [];

    constructor(url) {
      super();
      const source = new URL(url, document.baseURI).href.replaceAll('"', "%22");
      this.#frame.hidden = true;
      this.#frame.srcdoc = "<!doctype html>";
      this.#frame.addEventListener("load", () => this.#start(source), { once: true });
      const add = () => document.body.append(this.#frame);
      document.body ? add() : addEventListener("DOMContentLoaded", add);
    }

    /* What the worker posts arrives here, not in its own window. */
    #start(source) {
      const inside = this.#frame.contentWindow;
      inside.postMessage = (data) => this.#deliver(this, data);
      inside.importScripts = async (...urls) => {
        for (const url of urls) await this.#load(url);
      };
      this.#load(source).then(() => {
        const waiting = this.#waiting;
        this.#waiting = undefined;
        waiting.forEach((data) => this.#deliver(inside, data));
      });
    }

    #load(url) {
      return new Promise((resolve) => {
        const script = this.#frame.contentDocument.createElement("script");
        script.src = url;
        script.addEventListener("load", resolve);
        this.#frame.contentDocument.body.append(script);
      });
    }

    #deliver(target, data) {
      const event = new MessageEvent("message", { data });
      target.dispatchEvent(event);
      if (target === this && this.onmessage) this.onmessage(event);
    }

    postMessage(data) {
      if (this.#waiting) this.#waiting.push(data);
      else this.#deliver(this.#frame.contentWindow, data);
    }

    terminate() {
      this.#frame.remove();
    }
  };
}
