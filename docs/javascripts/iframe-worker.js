// A page that is opened from a folder (file://) may not start a worker, and search runs in one. Here it runs in a hidden
// frame instead, which answers by the same messages.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      const toPage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.target = new Promise((resolve) => {
        frame.onload = () => resolve(frame.contentWindow);
      });
      const script = document.createElement("script");
      script.src = url;
      window.__frameWorkers = window.__frameWorkers || [];
      const number = window.__frameWorkers.push(toPage) - 1;
      frame.srcdoc = `<script>postMessage = (data) => parent.__frameWorkers[${number}](data)</script>${script.outerHTML}`;
      document.body.append(frame);
    }

    postMessage(data) {
      this.target.then((target) => target.dispatchEvent(new target.MessageEvent("message", { data })));
    }

    terminate() {}
  };
}
