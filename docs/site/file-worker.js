// Search when the pages are opened from disk. Browsers start no Worker from a file, so there the worker's script runs in
// a hidden frame, behind the part of Worker's interface that the search uses.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      inside.postMessage = (data) => this.onmessage?.({ data });
      const script = inside.document.createElement("script");
      script.src = new URL(url, document.baseURI);
      script.onload = () => {
        this.loaded = true;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      };
      script.onerror = (event) => this.onerror?.(event);
      inside.document.body.append(script);
    }

    postMessage(data) {
      if (this.loaded) setTimeout(() => this.frame?.contentWindow.onmessage({ data }));
      else this.waiting.push(data);
    }

    terminate() {
      this.frame.remove();
      this.frame = null;
    }
  };
}
